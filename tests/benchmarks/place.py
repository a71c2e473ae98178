"""The tiny line as benchmarks see a product line."""

from pathlib import Path
from typing import Any

import yaml

from benchmarks.product_lines import ProductLine
from tests import tiny_line
from wtflow.data.manifest import PrepareParams
from wtflow.data.prepare import prepare


def tiny_product_line(root: Path, place: Path, **sections: dict[str, Any]) -> ProductLine:
    """A place with the tiny line's settings, `sections` instead of its own, its manifest and a link to its features."""
    settings = {"prepare": tiny_line.PREPARE, "extract": tiny_line.EXTRACT, "train": tiny_line.TRAIN} | sections
    stages = ("prepare", "extract", "train", "evaluate", "register")
    lines = {tiny_line.LINE: {stage: {} for stage in stages}}
    place.mkdir(exist_ok=True)
    (place / "params.yaml").write_text(yaml.safe_dump(settings | {"lines": lines}))
    raw = root / "data/raw" / tiny_line.LINE
    manifest = prepare(raw, tiny_line.LINE, PrepareParams.parse(settings["prepare"], "tests")).manifest
    manifest.write(place / f"data/prepared/{tiny_line.LINE}/manifest.parquet")
    (place / "data/features").symlink_to(root / "data/features")
    return ProductLine(tiny_line.LINE, place, raw)
