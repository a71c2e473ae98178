"""A training that is killed ends with the bundle of one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.project import SMALL, Project, make_project

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]
EPOCHS = 60


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Features extracted, ready to train."""
    made = make_project(tmp_path_factory.mktemp("kill"))
    made.configure(train={**SMALL["train"], "epochs": EPOCHS})
    made.stage("prepare")
    made.stage("extract")
    return made


@pytest.fixture(scope="module")
def undisturbed(project: Project) -> str:
    """Digest of the bundle of a run that nobody killed."""
    project.stage("train")
    return _digest(project)


def test_killed_worker(project: Project, undisturbed: str) -> None:
    process = _started(project)
    try:
        worker = _worker_of(process.pid)
        os.kill(worker.pid, signal.SIGKILL)
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
    assert _digest(project) == undisturbed


def test_killed_driver_goes_on_with_the_same_command(project: Project, undisturbed: str) -> None:
    process = _started(project)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = [path for path in (project.root / ".wtflow/train").iterdir() if path.is_dir()]
    assert list(run.glob("checkpoint_*"))
    project.stage("train")
    assert _digest(project) == undisturbed
    assert not run.exists()


def _started(project: Project) -> "subprocess.Popen[bytes]":
    """A training with two checkpoints behind it."""
    shutil.rmtree(project.root / "models", ignore_errors=True)
    command = [sys.executable, "-m", "pipelines.train", "tiny"]
    process = subprocess.Popen(command, cwd=project.root, env=project.environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while _checkpoints(project) < 2:
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def _checkpoints(project: Project) -> int:
    """Whole checkpoints; Ray keeps the newest two."""
    return len(list((project.root / ".wtflow/train").glob("*/checkpoint_*")))


def _worker_of(driver: int) -> psutil.Process:
    """The training worker among the processes that the driver started."""
    for process in psutil.Process(driver).children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            return process
    raise AssertionError("no training worker found")


def _digest(project: Project) -> str:
    digest: str = json.loads(Path(project.root / "models/tiny/bundle.json").read_text())["digest"]
    return digest
