"""A training that is killed ends with the bundle of one that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlflow
import psutil
import pytest

from tests.e2e.project import Project, ready_to_train
from tests.ray_processes import training, working

pytestmark = pytest.mark.slow
EPOCHS = 20
TRAININGS = """
import shutil
import sys
import torch
from pipelines.adapters import ray_train
from pipelines.environment import RunSettings
from pipelines.lines import line_params
from pipelines.train import train_line
from wtflow.training import TrainParams

settings = RunSettings()
torch.set_num_threads(settings.cores())
for _ in sys.stdin:
    shutil.rmtree(settings.work / "fields", ignore_errors=True)
    params = line_params("tiny", "train", TrainParams)
    print("digest", train_line("tiny", params, settings, ray_train.fit, lambda epoch: None).digest, flush=True)
"""
"""Trains `tiny` once for each line of standard input and prints the bundle's digest."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Features extracted, ready to train."""
    return ready_to_train(tmp_path_factory, "kill", EPOCHS)


@pytest.fixture(scope="module")
def undisturbed(project: Project) -> str:
    """Digest of the bundle of a run that nobody killed."""
    project.stage("train")
    return _digest(project)


@pytest.fixture(scope="module")
def interrupted(project: Project, undisturbed: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy of what a training left whose driver was killed in the middle."""
    process = _started(project, lambda: _epochs(_run(project)) >= 2)
    ray = working(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(ray, timeout=60)[1] == []  # they may finish an epoch until they notice
    left = _run(project)
    assert left is not None
    assert 2 <= _epochs(left) < EPOCHS
    return Path(shutil.move(left, tmp_path_factory.mktemp("left") / left.name))


def test_killed_worker(project: Project, undisturbed: str) -> None:
    process = _started(project, lambda: _epochs(_run(project)) >= 2)
    try:
        worker = _worker_of(process.pid)
        os.kill(worker.pid, signal.SIGKILL)
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
    assert _digest(project) == undisturbed


def test_killed_driver_goes_on_with_the_same_command(project: Project, undisturbed: str, interrupted: Path) -> None:
    """Killed in the middle, and once more between the last epoch and the bundle."""
    _restore(project, interrupted)
    done, before = _epochs(interrupted), _logged(project)
    process = _started(project, lambda: _epochs(_run(project)) == EPOCHS)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (project.root / "models/tiny").exists()
    between = _logged(project)
    assert 1 <= min(between - before) <= done  # behind the last epoch that Ray had noted: not from the first
    project.stage("train")
    assert _digest(project) == undisturbed
    assert _logged(project) == between  # nothing was trained again
    assert _run(project) is None


def test_workers_killed_at_random_moments(project: Project, undisturbed: str) -> None:
    """Trainings one after the other, until WTFLOW_KILLS of them had their worker killed: while it starts, within an
    epoch, while a checkpoint is written. Every training ends, with the same digest."""
    wanted, draw = int(os.environ.get("WTFLOW_KILLS", "2")), random.Random(0)
    command = [sys.executable, "-c", TRAININGS]
    process = subprocess.Popen(
        command, cwd=project.root, env=project.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        digest, life = _after(process, None)
        digests, moments = [digest], list[float]()
        while len(moments) < wanted:
            moment = draw.uniform(0, life)
            digest, lived = _after(process, moment)
            digests.append(digest)
            if lived >= moment:
                moments.append(moment)
            sys.stdout.write(f"{len(moments)} killed in {len(digests)} trainings; {moment:.2f} s: {digest[:12]}\n")
    finally:
        process.kill()
        process.wait()
    assert digests == [undisturbed] * len(digests)


@pytest.mark.parametrize("damaged", ["checkpoint_*/scorer.safetensors", "checkpoint_manager_snapshot.json"])
def test_a_half_written_file_means_another_start(
    project: Project, undisturbed: str, interrupted: Path, damaged: str
) -> None:
    """In the checkpoints, or in Ray's own note of them."""
    run = _restore(project, interrupted)
    files = list(run.glob(damaged))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    before = _logged(project)
    project.stage("train")
    assert _digest(project) == undisturbed
    assert sorted((_logged(project) - before).elements()) == list(range(EPOCHS))
    assert _run(project) is None


def _after(process: "subprocess.Popen[str]", moment: float | None) -> tuple[str, float]:
    """Digest of the next training of `TRAININGS`, whose worker is killed `moment` seconds after it appeared if it still
    lives then; and how long it lived."""
    assert process.stdin is not None
    assert process.stdout is not None
    before = {worker.pid for worker in training(process.pid)}
    process.stdin.write("train\n")
    process.stdin.flush()
    while not (found := [worker for worker in training(process.pid) if worker.pid not in before]):
        assert process.poll() is None
        time.sleep(0.05)
    began = time.monotonic()
    try:
        found[0].wait(timeout=moment)
        lived = time.monotonic() - began
    except psutil.TimeoutExpired:
        found[0].kill()
        lived = float("inf")
    said = (line.split() for line in process.stdout)  # Ray may have something to say, too
    return next((words[1] for words in said if words[:1] == ["digest"]), "none"), lived


def _started(project: Project, ready: Callable[[], bool]) -> "subprocess.Popen[bytes]":
    """A training that has come to where `ready` holds, and still runs."""
    project.untrain()
    command = [sys.executable, "-m", "pipelines.train", "tiny"]
    process = subprocess.Popen(command, cwd=project.root, env=project.environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def _restore(project: Project, interrupted: Path) -> Path:
    """Put the interrupted run back to where the next training looks for it."""
    project.untrain()
    runs = project.root / ".wtflow/train"
    shutil.rmtree(runs, ignore_errors=True)
    return Path(shutil.copytree(interrupted, runs / interrupted.name))


def _run(project: Project) -> Path | None:
    """Folder of the one run that has checkpoints, if there is one."""
    runs = list((project.root / ".wtflow/train").glob("tiny-*"))
    assert len(runs) <= 1
    return runs[0] if runs else None


def _epochs(run: Path | None) -> int:
    """How many epochs are behind the newest whole checkpoint of a run."""
    found = [0]
    for path in run.glob("checkpoint_*/state.json") if run else ():
        try:
            found.append(len(json.loads(path.read_text())["history"]))
        except (FileNotFoundError, json.JSONDecodeError):  # removed meanwhile, or not whole yet
            continue
    return max(found)


def _logged(project: Project) -> "Counter[int]":
    """How often each epoch's loss was logged, over all trainings of this file."""
    client = mlflow.MlflowClient(project.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("wtflow")
    (run,) = client.search_runs([experiment.experiment_id])
    return Counter(point.step for point in client.get_metric_history(run.info.run_id, "loss"))


def _worker_of(driver: int) -> psutil.Process:
    """The training worker among the processes that the driver started."""
    (worker,) = training(driver)
    return worker


def _digest(project: Project) -> str:
    digest: str = json.loads(Path(project.root / "models/tiny/bundle.json").read_text())["digest"]
    return digest
