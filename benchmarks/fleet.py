"""Fifty small lines through the fleet on two cores: what is lost beside the trainings, and whether memory grows.

A line is 20 random training images and 20 of calibration out of solar-mono's features, with the settings of
params.yaml; draw and seed differ. They are put under DVC in a clone of HEAD in .wtflow/bench/fleet, which is made anew.
The overhead is what the command takes beside the plain loop, which trains a few of the lines before, as many at a
time as there are cores, on one thread each. That of a line is counted from the first training's start to the last
one's end: checkpoints, MLflow, bundle, commits of DVC meanwhile, places that stand idle, and places that are taken
twice. That of the command has besides what is paid once: imports, DVC's status and last commit, start and stop of Ray.
`alone_s` is a line with all cores for itself. Seconds that the fleet's trainings tell are no measure: they overlap.
`make repro` brings the features.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
import yaml

from benchmarks.product_lines import PLACE, PROJECT, product_lines, trained
from benchmarks.report import Claim, at_most, parse_no_arguments, publish
from pipelines.lines import LINE_STAGES, read_params
from wtflow.artefact import save_tensors
from wtflow.data.shards import REJECTED, FeatureShards, part_name, seal
from wtflow.training import TrainParams

SOURCE = "solar-mono"
LINES, CORES, IMAGES = 50, 2, 20
PLAIN = (3, 17, 31, 44)
SAMPLED_EVERY_S = 5
TRAINED = re.compile(r"train (line-\d+): trained in ([\d.]+) s")
LAID_DOWN = ("format", "levels", "partitions", "images", "files")
"""What `seal` notes itself."""


def main() -> None:
    """Make the lines, train them, publish."""
    parse_no_arguments(__doc__ or "", "make bench NAME=fleet")
    place = PLACE / "fleet"
    make_lines(place)
    alone, plain = (_plain(place, at_once) for at_once in (1, CORES))
    command = [sys.executable, "-m", "pipelines.fleet", "--cpus", str(CORES)]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=place, env=_environment(place), stdout=subprocess.PIPE, text=True)
    trained: dict[str, float] = {}
    starts, ends = [], []
    assert process.stdout
    with _memory(process.pid) as memory:
        for told in process.stdout:
            for line, seconds in TRAINED.findall(told):
                trained[line] = float(seconds)
                ends.append(time.perf_counter())
                starts.append(ends[-1] - trained[line])
        if process.wait():
            raise SystemExit(f"the fleet ended with status {process.returncode}: see above")
    wall, busy = time.perf_counter() - began, max(ends) - min(starts)
    quarter = len(memory) // 4
    row = {
        "lines": LINES,
        "trained": len(trained),
        "wall_s": wall,
        "alone_s": alone,
        "plain_s": plain,
        "median_training_s": statistics.median(trained.values()),
        "busy_s": busy,
        "overhead_of_a_line": CORES * busy / (LINES * plain) - 1,
        "overhead_of_the_command": CORES * wall / (LINES * plain) - 1,
        "growth": statistics.median(memory[-quarter:]) / statistics.median(memory[quarter : 2 * quarter]) - 1,
        "pss_gib": [round(value, 2) for value in memory],
    }
    publish("fleet", [row], claims(row))


def claims(row: dict[str, Any]) -> list[Claim]:
    """What the run comes to."""
    return [
        at_most(f"{LINES} small lines: lines that were not trained", row["lines"] - row["trained"], 0),
        at_most(
            f"{LINES} small lines: overhead of a line, as a share of its plain training",
            row["overhead_of_a_line"],
            0.10,
        ),
        at_most(
            f"{LINES} small lines: overhead of the command, as a share of the time of plain trainings",
            row["overhead_of_the_command"],
            0.10,
        ),
        at_most(
            f"{LINES} small lines: memory of all processes, last quarter of the run over the second, less 1",
            row["growth"],
            0.05,
        ),
    ]


def make_lines(place: Path) -> None:
    """A clone with all lines up to their features, as DVC has it."""
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", PROJECT, place], check=True)
    (source,) = (line.shards("fit") for line in product_lines() if line.name == SOURCE)
    lines = [f"line-{number:02}" for number in range(LINES)]
    sections: dict[str, Any] = {
        line: {**{stage: {} for stage in LINE_STAGES}, "train": {"seed": number}} for number, line in enumerate(lines)
    }
    params = {**read_params(PROJECT / "params.yaml"), "fetch": {}, "lines": sections}
    (place / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (place / "dvc.lock").unlink(missing_ok=True)
    for number, line in enumerate(lines):
        write_line(source, place / f"data/features/{line}/fit", number)
        for folder in (f"data/raw/{line}", f"data/prepared/{line}", f"data/features/{line}/test"):
            (place / folder).mkdir(parents=True)
            (place / folder / "note").write_text(f"{line}: its images are those of {SOURCE}\n")
    done = [f"{stage}@{line}" for line in lines for stage in ("prepare", "extract")]
    add = ["-m", "dvc", "add", "-q", *(f"data/raw/{line}" for line in lines)]
    code = ["-m", "dvc", "repro", "-q", "code-prepare", "code-extract"]
    commit = ["-c", "import sys; from pipelines.adapters.dvc_lock import commit; commit(sys.argv[1:])", *done]
    for arguments in (add, code, commit):
        subprocess.run([sys.executable, *arguments], cwd=place, env=_environment(place), check=True)


def write_line(source: FeatureShards, folder: Path, draw: int) -> None:
    """Some random images of a line as features of their own."""
    generator = np.random.default_rng(draw)
    rows = [row for split in ("train", "calibrate") for row in generator.permutation(source.rows(split=split))[:IMAGES]]
    folder.mkdir(parents=True)
    save_tensors(folder / part_name(0), {f"level{level}": maps for level, maps in source.batch(rows).items()})
    index = source.index.take(pa.array(rows))
    for column, values in (("partition", [0] * len(rows)), ("row", list(range(len(rows))))):
        index = index.set_column(index.schema.get_field_index(column), column, pa.array(values))
    for name in (REJECTED, "backbone.safetensors"):
        shutil.copy(source.folder / name, folder / name)
    seal(folder, index, source.levels, {key: value for key, value in source.header.items() if key not in LAID_DOWN})


def _plain(place: Path, at_once: int) -> float:
    """Seconds of the plain loop for a line on one thread, beside others of them."""
    folders = [place / f"data/features/line-{number:02}/fit" for number in PLAIN]
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
        return statistics.median(pool.map(_seconds, folders, PLAIN))


def _seconds(features: Path, seed: int) -> float:
    torch.set_num_threads(1)
    params = TrainParams.parse({**read_params(PROJECT / "params.yaml")["train"], "seed": seed}, "params.yaml: train")
    began = time.perf_counter()
    trained(FeatureShards.open(features), params)
    return time.perf_counter() - began


@contextmanager
def _memory(pid: int) -> Iterator[list[float]]:
    """GiB of a process and all below it, shared pages counted once, over the time within."""
    found: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLED_EVERY_S):
            found.append(sum(map(_pss, _tree(pid))) / 2**30)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:  # it ended just now
        return []


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def _environment(place: Path) -> dict[str, str]:
    """One thread a line, and everything in the clone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WTFLOW_", "RAY_", "MLFLOW_T"))}
    return {**kept, "PYTHONPATH": str(place), "WTFLOW_THREADS": "1", "DVC_NO_ANALYTICS": "1"}


if __name__ == "__main__":
    main()
