"""A disk that is full for checkpoints or for the bundle: what is said, what is kept, how it goes on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.project import SMALL, Project, ready_to_train
from wtflow.bundle import load_bundle

pytestmark = pytest.mark.slow
EPOCHS = 12
FLEET = "from pipelines.fleet import _train; from pipelines.environment import RunSettings; import sys; " + (
    "failed = _train(['tiny'], RunSettings(), 1); sys.exit(failed.get('tiny', 0))"
)
COMMANDS = {"stage": [sys.executable, "-m", "pipelines.train", "tiny"], "fleet": [sys.executable, "-c", FLEET]}


class Disk:
    """A file system in memory, of as many KiB as are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, kib: int) -> None:
        """Keeps what is there."""
        subprocess.run(["mount", "-o", f"remount,size={kib}k", self.path], check=True, capture_output=True)


@contextmanager
def disk(path: Path, kib: int) -> Iterator[Disk]:
    """Mounted at `path`; the test is skipped where that is not allowed."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Features extracted, ready to train."""
    made = ready_to_train(tmp_path_factory, "full", EPOCHS)
    made.run("dvc", "repro", "-q", "code-train")  # `_train` of the fleet is behind what does so
    made.environment["WTFLOW_CHECKPOINT_S"] = "0"
    return made


@pytest.fixture(scope="module")
def undisturbed(project: Project) -> Path:
    """The bundle of a training that had space, moved away."""
    project.stage("train")
    return (project.root / "models/tiny").rename(project.root / "undisturbed")


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_space_for_checkpoints(project: Project, undisturbed: Path, command: list[str], tmp_path: Path) -> None:
    project.untrain()
    with disk(tmp_path / "kept", 600) as small:  # two states of 240 kB, and not a third
        project.environment["WTFLOW_STORAGE"] = str(small.path)
        try:
            printed = project.run(*command, code=1)
            assert "no space left for" in printed, printed
            (run,) = small.path.iterdir()
            assert f"no space left for {run}" in printed
            assert "Traceback" not in printed
            assert "type the same command" in printed or command is COMMANDS["fleet"]
            assert 2 <= _epochs(run) < EPOCHS
            assert not (project.root / "models/tiny").exists()
            small.resize(4000)
            known = _logged(project)
            project.run(*command)
            assert len(_logged(project)) - len(known) <= EPOCHS - 2  # behind the last whole state: not from the first
        finally:
            del project.environment["WTFLOW_STORAGE"]
        assert load_bundle(project.root / "models/tiny").digest == load_bundle(undisturbed).digest
        assert list(small.path.iterdir()) == []
    (project.root / "models/tiny").rename(tmp_path / "done")


def test_no_space_for_the_bundle(project: Project, undisturbed: Path) -> None:
    """The bundle that was there stays, and what was trained is not trained again."""
    models, size = project.root / "models", sum(path.stat().st_size for path in undisturbed.iterdir()) // 1024
    with disk(models, 2 * size + 1000) as small:
        project.stage("train")
        small.resize(size + 300)  # the new one does not fit beside the old one
        project.configure(train={**SMALL["train"], "epochs": EPOCHS, "seed": 1})
        printed = project.run(*COMMANDS["stage"], code=1)
        assert f"error: no space left for {models.name}/tiny" in printed
        assert load_bundle(models / "tiny").digest == load_bundle(undisturbed).digest
        assert [path.name for path in models.iterdir()] == ["tiny"]
        known = _logged(project)
        small.resize(2 * size + 1000)
        project.stage("train")
        assert _logged(project) == known
        assert load_bundle(models / "tiny").provenance["seed"] == 1
        assert list((project.root / ".wtflow/train").iterdir()) == []


def _epochs(run: Path) -> int:
    """How many epochs are behind the newest whole state of a run."""
    found = [0]
    for path in run.rglob("state.json"):
        try:
            found.append(len(json.loads(path.read_text())["history"]))
        except json.JSONDecodeError:  # there was no space for it
            continue
    return max(found)


def _logged(project: Project) -> list[tuple[str, int]]:
    """Every loss that was logged: its run, its epoch."""
    import mlflow

    client = mlflow.MlflowClient(project.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("wtflow")
    runs = client.search_runs([experiment.experiment_id])
    histories = {run.info.run_id: client.get_metric_history(run.info.run_id, "loss") for run in runs}
    return [(run, point.step) for run, points in histories.items() for point in points]
