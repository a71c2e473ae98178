"""SIGKILL at random moments of the stage `extract`: is the cache still whole, and the one of an undisturbed run?

Each time the stage is started as a process of its own, forked from one that has its imports behind it, and killed
after a random time, up to what the whole stage takes; what it left is continued by the next one. Whenever one got
through, its cache and its outputs are compared, byte by byte, with those of a run that nobody killed, and everything
is removed. The last run is not killed.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks.product_lines import PROJECT
from benchmarks.report import at_least, at_most, publish
from pipelines import extract, prepare
from pipelines.lines import LINE_STAGES, read_params
from wtflow.errors import WTFlowError
from wtflow.features.cache import UNFINISHED, FeatureCache
from wtflow.features.upkeep import faults
from wtflow.params import merged

LINE = "drill"
IMAGES, SIDE = 1280, 64
SETTINGS = {
    "prepare": {"layout": "folder", "test_fraction": 0.25, "calibrate_fraction": 0.25},
    "extract": {"backbone": {"image_size": [SIDE, SIDE]}, "partition_size": 8, "batch_size": 8},
}
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["timm", "pipelines.extract"])  # timm: the stage imports it when it needs it


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    shards: list[int] = field(default_factory=list)
    """In the cache at each kill."""
    half_written: int = 0
    """Kills that left a temporary file."""
    finished: int = 0
    damaged: int = 0
    """Of the finished ones: faults that `wtflow cache verify` would name."""
    different: int = 0
    """Of the finished ones: cache or output of other bytes."""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="default: %(default)s")
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        seconds, tally = drill(Path(folder), kills)
    shards = np.array(tally.shards)
    row = {
        "kills": tally.kills,
        "stage_seconds": round(seconds, 2),
        "shards_at_kill": " ".join(str(int(value)) for value in np.quantile(shards, (0, 0.25, 0.5, 0.75, 1))),
        "kills_inside_a_write": tally.half_written,
        "finished_runs": tally.finished,
        "damaged_files": tally.damaged,
        "different": tally.different,
    }
    claims = [
        at_least("extraction: processes killed at random moments", tally.kills, kills),
        at_most("extraction after kills: damaged files in the caches of the runs that got through", tally.damaged, 0),
        at_most("extraction after kills: caches or outputs of other bytes than undisturbed", tally.different, 0),
    ]
    publish("kills", [row], claims)


def drill(folder: Path, kills: int, seed: int = 0) -> tuple[float, Tally]:
    """Seconds of the undisturbed stage, and what the kills did."""
    _write_line(folder)
    with _started(folder, prepare.main):
        pass
    with _started(folder, extract.main):
        pass
    began = time.monotonic()
    _clear(folder)
    with _started(folder, extract.main):  # the first one waited for the imports, too
        pass
    seconds = time.monotonic() - began
    whole, rng, tally = _bytes(folder), random.Random(seed), Tally()
    _clear(folder)
    fresh = True
    while tally.kills < kills:
        with _started(folder, extract.main) as process:
            began = time.monotonic()
            process.join(timeout=rng.uniform(0, seconds))
            if process.exitcode is None:
                process.kill()
            elif fresh:
                seconds = min(seconds, time.monotonic() - began)  # the first run may have found a busy machine
        fresh = process.exitcode == 0
        if process.exitcode == -signal.SIGKILL:
            tally.kills += 1
            tally.shards.append(len(list(folder.glob(".wtflow/features/*/*.safetensors"))))
            tally.half_written += any(folder.glob(f".wtflow/features/*/{UNFINISHED}"))
        else:
            _finish(folder, whole, tally)
    with _started(folder, extract.main):
        pass
    _finish(folder, whole, tally)
    return seconds, tally


def _finish(folder: Path, whole: dict[str, bytes], tally: Tally) -> None:
    """Compare what a run that got through left, and remove it."""
    tally.finished += 1
    tally.damaged += sum(1 for shelf in FeatureCache(folder / ".wtflow/features").shelves() for _ in faults(shelf))
    found = _bytes(folder)
    for name in sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name)):
        what = "other bytes" if name in found and name in whole else "missing" if name in whole else "too many"
        sys.stdout.write(f"{name}: {what}\n")
    tally.different += found != whole
    _clear(folder)


@contextmanager
def _started(folder: Path, stage: Callable[[str], None]) -> Iterator[ForkServerProcess]:
    """A process of a stage; at the end it is waited for, and must have ended well or been killed."""
    process = START.Process(target=_run, args=(folder, stage))
    process.start()
    yield process
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise WTFlowError(f"the stage ended with {process.exitcode}; its error is above")


def _run(folder: Path, stage: Callable[[str], None]) -> None:
    """What the process does: the stage in the project `folder`, what it prints thrown away."""
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith(("WTFLOW_", "RAY_"))]:
        del os.environ[name]
    os.environ["WTFLOW_THREADS"] = "2"
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        stage(LINE)


def _write_line(folder: Path) -> None:
    """Noise, a PNG an image; what is in it does not matter here."""
    rng = np.random.default_rng(0)
    (folder / f"data/raw/{LINE}/good").mkdir(parents=True)
    for number in range(IMAGES):
        image_YX3: np.ndarray = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(image_YX3).save(folder / f"data/raw/{LINE}/good/{number:03d}.png")
    params = read_params(PROJECT / "params.yaml")
    stages = {stage: merged(params[stage], SETTINGS.get(stage, {})) for stage in ("prepare", "extract")}
    lines: dict[str, Any] = {LINE: {stage: {} for stage in LINE_STAGES}}
    (folder / "params.yaml").write_text(yaml.safe_dump({**stages, "lines": lines}))


def _bytes(folder: Path) -> dict[str, bytes]:
    """Every file of the cache and of the outputs."""
    found = [*(folder / ".wtflow/features").rglob("*"), *(folder / "data/features").rglob("*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}


def _clear(folder: Path) -> None:
    for name in (".wtflow", "data/features"):
        shutil.rmtree(folder / name)


if __name__ == "__main__":
    main()
