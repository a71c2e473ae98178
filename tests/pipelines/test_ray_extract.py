"""Partitions as Ray tasks: the bytes of one process, also when a worker is killed in the middle."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import yaml

from pipelines import extract
from pipelines.adapters import ray_extract
from tests.guards.closure import ROOT
from tests.tiny_line import EXTRACT, LINE, PREPARE
from wtflow.features.cache import FeatureCache
from wtflow.features.upkeep import faults

STAGES = ("prepare", "extract", "train", "evaluate", "register")


@pytest.fixture
def workspace(tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny line, prepared, in a folder with the code, where two workers are asked for."""
    for name in ("raw", "prepared"):
        shutil.copytree(tiny_features / "data" / name, tmp_path / "data" / name)
    for package in ("wtflow", "pipelines"):
        (tmp_path / package).symlink_to(ROOT / package)
    params = {"prepare": PREPARE, "extract": EXTRACT, "lines": {LINE: {stage: {} for stage in STAGES}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in {"NUM_WORKERS": "2", "THREADS": "2"}.items():
        monkeypatch.setenv(f"WTFLOW_{name}", value)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def workers() -> list[int]:
    """Processes below this one that run a partition: Ray writes the task's name into their title."""
    parents, titles = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(place.name)] = (place / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue

    def mine(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid, title in titles.items() if title.startswith(b"ray::_task") and mine(pid)]


@pytest.mark.slow
def test_a_killed_worker_costs_a_partition_and_no_byte(
    workspace: Path, tiny_features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    stop = threading.Event()

    def kill_one() -> None:
        while not killed and not stop.wait(0.1):
            for pid in workers()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        extract.main(LINE)
    finally:
        stop.set()
        killer.join()
    assert len(killed) == 1
    for output in extract.OUTPUTS:
        mine, theirs = (root / f"data/features/{LINE}/{output}" for root in (workspace, tiny_features))
        assert contents(mine) == contents(theirs)
    (shelf,) = FeatureCache(workspace / ".wtflow/features").shelves()
    assert list(faults(shelf)) == []
    assert sum(len(image_ids) for _, image_ids in shelf.contents()) == 60

    def no_ray(*_: object) -> None:
        pytest.fail("a cluster was started for nothing")

    monkeypatch.setattr(ray_extract, "cluster", no_ray)
    extract.main(LINE)
