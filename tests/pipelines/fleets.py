"""A project with several small lines whose features are there, under DVC, each stage before `train` done."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.project import ROOT, SMALL, Project, make_project
from wtflow.params import merged


def make_fleet(root: Path, count: int, **train: Any) -> Project:
    """Lines `line-0`, ... with the photographs of `tiny` each, and a seed of their own."""
    project = make_project(root)
    lines = {f"line-{number}": _sections(number, train) for number in range(count)}
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"fetch": {}, "lines": lines}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for line in lines:
        shutil.copytree(root / "data/raw/tiny", root / "data/raw" / line)
    shutil.rmtree(root / "data/raw/tiny")
    project.run("dvc", "add", "-q", *(f"data/raw/{line}" for line in lines))
    code = f"from pipelines import extract, prepare\nfor line in {list(lines)}: prepare.main(line); extract.main(line)"
    project.run(sys.executable, "-c", code)  # one process, and not one a stage
    project.run("dvc", "repro", "-q", "code-prepare", "code-extract")
    project.run("dvc", "commit", "-q", "-f", *(f"{stage}@{line}" for line in lines for stage in ("prepare", "extract")))
    project.commit(".")
    return project


def _sections(number: int, train: dict[str, Any]) -> dict[str, Any]:
    return merged(SMALL, {"train": {"seed": number, **train}})


def digest(project: Project, line: str) -> str:
    """Of a line's bundle."""
    found: str = json.loads((project.root / f"models/{line}/bundle.json").read_text())["digest"]
    return found
