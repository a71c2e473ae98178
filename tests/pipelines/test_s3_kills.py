"""A download from a bucket that is killed at random moments, again and again, and goes on.

The processes are forked from one that has imported everything, so that most of the moments lie within the download.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from pipelines import fetch
from tests.pipelines.faulty_proxy import Proxy
from tests.pipelines.test_s3 import filled, held, project, upload_in_parts

KILLS = int(os.environ.get("WTFLOW_TEST_KILLS", "10"))
START = multiprocessing.get_context("forkserver")
FAULTS = ("500", "503", "cut", "short", "long", "flip")


def run_fetch(root: str, environment: dict[str, str]) -> None:
    """What a process of the drill does: the stage, its output in a file."""
    os.environ.update(environment)
    os.chdir(root)
    with open("said.txt", "a", encoding="utf-8") as said:  # noqa: PTH123
        sys.stdout = sys.stderr = said
        fetch.main("bottles")


def started(root: Path) -> ForkServerProcess:
    names = ("AWS_", "WTFLOW_S3_")
    environment = {name: value for name, value in os.environ.items() if name.startswith(names)}
    process = START.Process(target=run_fetch, args=(str(root), environment))
    process.start()
    return process


def assert_nothing_partial_counts(root: Path, content: dict[str, bytes]) -> int:
    """What bears an object's name holds its bytes; the line's folder is whole or absent. Says how many are there."""
    work, raw = held(root / ".wtflow/fetch/bottles"), held(root / "data/raw/bottles")
    whole = {name: data for name, data in work.items() if ".tmp-" not in name}
    assert whole.items() <= content.items()
    assert raw in ({}, content)
    return len(whole)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("failing", [0.0, 0.2], ids=["a sound server", "a fifth of the requests failing"])
def test_kills_at_random_moments_cost_nothing_that_was_whole(
    s3: Proxy, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: float
) -> None:
    content, dice = filled(bucket, 60), random.Random(3)
    large = [dice.randbytes(5 << 20), dice.randbytes(1 << 20)]
    upload_in_parts(bucket, "line/large.bin", *large)
    content["large.bin"] = b"".join(large)
    for name, value in {"CONNECTIONS": "2", "PAUSE": "0.01", "ATTEMPTS": "30"}.items():
        monkeypatch.setenv(f"WTFLOW_S3_{name}", value)
    START.set_forkserver_preload(["tests.pipelines.test_s3_kills"])

    def slowly(method: str, path: str) -> str | None:
        time.sleep(0.02)
        return dice.choice(FAULTS[: 3 if "list-type" in path else None]) if dice.random() < failing else None

    s3.fault = slowly
    for undisturbed in ("with the imports", "without"):
        project(tmp_path / undisturbed, f"s3://{bucket.name}/line")
        began = time.monotonic()
        first = started(tmp_path / undisturbed)
        first.join()
        window = time.monotonic() - began
        assert first.exitcode == 0
        assert held(tmp_path / undisturbed / "data/raw/bottles") == content

    kills: Counter[str] = Counter()
    rounds, root = 1, tmp_path / "round 1"
    project(root, f"s3://{bucket.name}/line")
    while kills.total() < KILLS or not (root / "data/raw/bottles").exists():
        if (root / "data/raw/bottles").exists():  # whole before it was killed often enough: from the beginning
            rounds, root = rounds + 1, tmp_path / f"round {rounds + 1}"
            project(root, f"s3://{bucket.name}/line")
        run = started(root)
        run.join(dice.uniform(0, window) if kills.total() < KILLS else None)
        if run.is_alive():
            assert run.pid
            os.kill(run.pid, signal.SIGKILL)
            run.join()
        here = assert_nothing_partial_counts(root, content)
        if run.exitcode == -signal.SIGKILL:
            kills["before the first file" if not here else "among the files"] += 1
        else:
            assert run.exitcode == 0, (root / "said.txt").read_text()
            assert held(root / "data/raw/bottles") == content
    print(f"{kills.total()} kills: {dict(kills)}, {rounds} rounds, {sum(s3.done.values())} requests: {dict(s3.done)}")  # noqa: T201
    assert kills["among the files"] > kills.total() / 4
    said = [
        line for line in (root / "said.txt").read_text().splitlines() if line.startswith("fetch bottles: 61 objects")
    ]
    assert len(said) == 1
