"""Settings of a search that is small enough for a test."""

from pathlib import Path
from typing import Any

import yaml

from pipelines.lines import LINE_STAGES
from tests import tiny_line
from wtflow.params import merged

TUNE: dict[str, Any] = {
    "space": {
        "learning_rate": {"type": "float", "low": 0.001, "high": 0.01, "log": True},
        "velocity.width": {"type": "choice", "values": [8, 16]},
    },
    "objective": {
        "kind": "synthetic",
        "normals": "train",
        "share": 0.4,
        "defects": ["cut-paste", "noise"],
        "seed": 0,
    },
    "budget": {"trials": 4, "minutes": None},
    "concurrency": 1,
    "seed": 0,
    "halving": {"grace_epochs": 2, "reduction": 2},
}


def write_project(features: Path, place: Path, **tune: Any) -> None:
    """params.yaml with the tiny line in `place`, and links to its data."""
    lines = {tiny_line.LINE: {stage: {} for stage in LINE_STAGES}}
    sections = {"prepare": tiny_line.PREPARE, "extract": tiny_line.EXTRACT, "train": tiny_line.TRAIN}
    values = {"lines": lines, **sections, "tune": merged(TUNE, tune)}
    (place / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (place / "data").symlink_to(features / "data")
