"""A copy of the project in a git repository of its own, with one small line of real photographs."""

import csv
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from pipelines.lock import alone

ROOT = Path(__file__).parents[2]
WANTED = {"0.0": 72, "1.0": 12, "0.3333333333333333": 3}
SMALL = {
    "prepare": {"group_block": 4, "test_fraction": 0.25, "calibrate_fraction": 0.3},
    "extract": {"backbone": {"image_size": [64, 64]}, "partition_size": 16, "batch_size": 8},
    "train": {
        "epochs": 6,
        "fusion": {"levels": [2, 3], "stride": 8},
        "velocity": {"width": 8},
        "calibration": {"target_fpr": 0.2},
    },
    "evaluate": {"gallery": 2},
    "register": {},
}


class Project:
    """Runs commands in the copy as a user would."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(root),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "WTFLOW_THREADS": "1",
            "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DVC_NO_ANALYTICS": "1",
        }
        for name in ("WTFLOW_WORK", "WTFLOW_STORAGE", "RAY_ADDRESS"):
            self.environment.pop(name, None)

    def run(self, *command: str, code: int = 0) -> str:
        """Output of a command that must exit with `code`."""
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def stage(self, name: str) -> str:
        """Output of a stage of the line `tiny`, run without DVC."""
        return self.run(sys.executable, "-m", f"pipelines.{name}", "tiny")

    def untrain(self) -> None:
        """Remove the bundles, and the fields that are kept: the next training trains."""
        for folder in ("models", ".wtflow/fields"):
            shutil.rmtree(self.root / folder, ignore_errors=True)

    def commit(self, *paths: str) -> None:
        """Commit what changed under `paths`."""
        self.run("git", "add", *paths)
        self.run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "change")

    def configure(self, **overrides: object) -> None:
        """Write params.yaml: the project's own with `tiny` as its only line."""
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params |= {"fetch": {}, "lines": {"tiny": {**SMALL, **overrides}}}
        (self.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def make_project(root: Path) -> Project:
    """Copy what git knows of the project, make it a repository, and bring the photographs of `tiny`."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.endswith(("dvc.lock", ".dvc")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    project = Project(root)
    project.configure()
    project.run("git", "init", "-q")
    project.commit(".")
    _photographs(root / "data/raw/tiny")
    return project


def ready_to_train(places: pytest.TempPathFactory, name: str, epochs: int) -> Project:
    """The same with the features of `tiny` extracted, to be trained for so many epochs: a copy in a folder `name` of
    what the first one to ask, in whichever process of the tests, has made."""
    base = places.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with alone(shared / "ready.lock"):
        if not (shared / "ready").is_dir():
            made = make_project(shared / "ready.draft")
            made.stage("prepare")
            made.stage("extract")
            made.root.rename(shared / "ready")
    project = Project(shutil.copytree(shared / "ready", places.mktemp(name) / "project"))
    project.configure(train={**SMALL["train"], "epochs": epochs})
    return project


def _photographs(folder: Path) -> None:
    source = Path(str(getattr(find_spec("elpv_dataset"), "origin", ""))).parent / "data"
    (folder / "images").mkdir(parents=True)
    left = dict(WANTED)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "probability", "cell"])
        for cell, line in enumerate((source / "labels.csv").read_text().splitlines()):
            path, probability, kind = line.split()
            if kind == "mono" and left.get(probability, 0) > 0:
                left[probability] -= 1
                shutil.copy(source / path, folder / path)
                table.writerow([path, probability, cell])
