"""What a team keeps elsewhere: DVC remotes in a folder and on S3, and checkpoints of a training on S3."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from tests.e2e.project import SMALL, Project, make_project
from tests.s3_server import FOREIGN, environment, fresh_bucket

pytestmark = pytest.mark.slow
EPOCHS = 12


@pytest.fixture(scope="module")
def bucket(s3_port: int) -> Iterator[Any]:
    """An empty bucket for this file."""
    with fresh_bucket(s3_port) as made:
        yield made


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory, s3_port: int) -> Project:
    """The small line, reproduced once, committed; its commands find the S3 server."""
    project = make_project(tmp_path_factory.mktemp("storage") / "first")
    project.configure(train={**SMALL["train"], "epochs": EPOCHS})
    project.environment |= environment(f"http://127.0.0.1:{s3_port}")
    for name in FOREIGN:
        project.environment.pop(name, None)
    project.run("dvc", "add", "data/raw/tiny")
    project.run("dvc", "repro")
    project.commit(".")
    return project


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_what_one_clone_pushes_another_pulls(road: Project, bucket: Any, tmp_path: Path, kind: str) -> None:
    url = f"s3://{bucket.name}/dvc" if kind == "s3" else str(tmp_path / "store")
    road.run("dvc", "remote", "add", "--force", "--default", "store", url)
    road.commit(".dvc/config")
    assert "files pushed" in road.run("dvc", "push")
    assert "Everything is up to date." in road.run("dvc", "push")
    assert "in sync" in road.run("dvc", "status", "--cloud")
    secret = road.environment["AWS_SECRET_ACCESS_KEY"]
    assert f"= {secret}" not in (road.root / ".dvc/config").read_text()

    road.run("git", "clone", "-q", str(road.root), str(tmp_path / "second"))
    second = Project(tmp_path / "second")
    second.environment = road.environment | {"PYTHONPATH": str(second.root)}
    assert not (second.root / "data/raw/tiny").exists()
    second.run("dvc", "pull")
    for kept in ("data/raw/tiny", "data/features/tiny", "models/tiny", "reports/tiny"):
        assert held(second.root / kept) == held(road.root / kept) != {}
    # only the registry is of a machine, not of the data: it is asked, and knows the bundle
    assert set(json.loads(second.run("dvc", "status", "--json"))) == {"register@tiny"}
    done = second.run("dvc", "repro")
    assert [line for line in done.splitlines() if line.startswith("Running stage")] == [
        "Running stage 'register@tiny':"
    ]
    assert "Data and pipelines are up to date." in second.run("dvc", "status")
    assert second.run("git", "status", "--porcelain") == ""


def test_a_remote_that_cannot_be_reached_leaves_what_is_here(road: Project, tmp_path: Path) -> None:
    road.run("dvc", "remote", "add", "--force", "--default", "store", "s3://bucket/dvc")
    away = Project(road.root)
    away.environment = road.environment | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    before = held(road.root / "models/tiny")
    assert "127.0.0.1:9" in away.run("dvc", "push", code=255)
    assert held(road.root / "models/tiny") == before
    road.run("git", "checkout", "-q", ".dvc/config")


def test_a_training_with_checkpoints_on_s3_is_killed_and_goes_on(road: Project, bucket: Any) -> None:
    """To the bundle of the training with checkpoints on disk that nobody killed."""
    undisturbed, before = digest(road), logged(road)
    road.untrain()
    road.environment["WTFLOW_STORAGE"] = f"s3://{bucket.name}/train"
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.train", "tiny"],
        cwd=road.root,
        env=road.environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while epochs(bucket) < 3:
            assert process.poll() is None, "the training ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (road.root / "models/tiny").exists()
    between = logged(road)
    kept = {one.key for one in bucket.objects.filter(Prefix="train/")}
    assert any(key.endswith("state.json") for key in kept)
    road.stage("train")
    assert digest(road) == undisturbed
    # every epoch counts once more than before, but for the few that had ended and were not kept when the kill came
    twice = (logged(road) - before) - Counter(range(EPOCHS))
    assert 0 not in twice
    assert logged(road) - between != Counter(range(EPOCHS))
    assert list(bucket.objects.filter(Prefix="train/tiny-")) == []


def test_a_storage_that_cannot_be_reached_is_named_and_leaves_what_is_here(road: Project) -> None:
    before = held(road.root / "models/tiny")
    shutil.rmtree(road.root / ".wtflow/fields")
    away = Project(road.root)
    away.environment = road.environment | {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "WTFLOW_STORAGE": "s3://no-such-bucket/train",
    }
    began = time.monotonic()
    said = away.run(sys.executable, "-m", "pipelines.train", "tiny", code=1)
    assert said.splitlines()[-1].startswith("error: WTFLOW_STORAGE: s3://no-such-bucket/train cannot be written to")
    assert "Look at the bucket's name, AWS_ENDPOINT_URL" in said
    assert "Traceback" not in said
    assert time.monotonic() - began < 120
    assert held(road.root / "models/tiny") == before


def held(folder: Path) -> dict[str, bytes]:
    """Every file, by its path in the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def digest(project: Project) -> str:
    """Of the bundle."""
    found: str = json.loads((project.root / "models/tiny/bundle.json").read_text())["digest"]
    return found


def epochs(bucket: Any) -> int:
    """How many whole checkpoints have been seen; Ray numbers them by time and keeps two."""
    seen: set[str] = getattr(bucket, "_seen", set())
    seen |= {one.key for one in bucket.objects.filter(Prefix="train/") if one.key.endswith("state.json")}
    bucket._seen = seen
    return len(seen)


def logged(project: Project) -> "Counter[int]":
    """How often each epoch's loss was logged, over all trainings of this file."""
    client = mlflow.MlflowClient(project.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("wtflow")
    runs = client.search_runs([experiment.experiment_id])
    return Counter(point.step for run in runs for point in client.get_metric_history(run.info.run_id, "loss"))
