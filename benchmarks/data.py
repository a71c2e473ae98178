"""How the data stages grow: 100,000 small images in 500 groups through DVC and `prepare`, and the status of 50 lines.

Everything happens in a temporary copy of the project. Other work on the machine stretches seconds: so each is also told
as a multiple of reading and hashing the same files with plain Python, a moment before.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import yaml
from PIL import Image

from benchmarks.report import Claim, at_most, publish
from wtflow.artefact import save_tensors, sha256_file

PROJECT = Path(__file__).parents[1]
GROUPS, SIDE, LINES = 500, 64, 50
ADDED_SHARE = 0.01
LINE = "many"
SECTIONS: dict[str, Any] = {
    "prepare": {"layout": "folder", "group_pattern": r"(part\d+)"},
    **{stage: {} for stage in ("extract", "train", "evaluate", "register")},
}


@dataclass(frozen=True)
class Step:
    """What a command took."""

    step: str
    images: int
    seconds: float
    cpu_seconds: float
    """User and system, of all its processes that were waited for."""
    peak_gb: float
    """Proportional memory (PSS) of all its processes together, sampled."""
    times_plain: float | None = None
    """Seconds as a multiple of those for reading and hashing the images."""


def main() -> None:
    """A row a step."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python -m benchmarks.data --images 5000")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--without-extract", action="store_true", help="leave out the extraction, which takes longest")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wtflow-data-") as place:
        root = Path(place) / "project"
        make_project(root)
        steps = many_images(root, asked.images, not asked.without_extract)
        steps.append(many_lines(root))
    publish("data", [asdict(step) for step in steps], claims({step.step: step for step in steps}, asked.images))


def claims(steps: dict[str, Step], images: int) -> list[Claim]:
    """What was promised of 100,000 images; said with the number that there were."""
    named = f"{images:,} images"
    found = [
        at_most(f"{named}: minutes of prepare", steps["prepare"].seconds / 60, 5),
        at_most(f"{named}: GB of memory of prepare at its peak", steps["prepare"].peak_gb, 1.5),
        at_most(f"{named}: seconds of dvc repro with nothing to do", steps["repro, nothing to do"].seconds, 10),
        at_most(f"seconds of dvc status over {LINES} lines", steps["status of all lines"].seconds, 5),
    ]
    if "extract" in steps:
        first, idle, more = (
            steps[step].cpu_seconds for step in ("extract", "extract, nothing to do", "extract, 1 % added")
        )
        of_first = "as a share of the first extraction"
        found.append(at_most(f"{named}: what 1 % more adds to an extraction, {of_first}", (more - idle) / first, 0.02))
        found.append(at_most(f"{named}: extracting 1 % more, {of_first}", more / first, 0.02))
    return found


def many_images(root: Path, images: int, with_extract: bool) -> list[Step]:
    """One line with all the images."""
    configure(root, {LINE: SECTIONS})
    raw = root / "data/raw" / LINE
    write_images(raw, range(images))
    plain = measured("read and hash", images, lambda: python(root, READ_AND_HASH, str(raw)))
    steps = [plain]

    def step(name: str, *command: str) -> None:
        steps.append(measured(name, images, lambda: start(root, *command), plain.seconds))

    version = (
        f"from pathlib import Path; from wtflow.data.version import data_version; data_version(Path({str(raw)!r}))"
    )
    step("data_version", sys.executable, "-c", version)
    step("dvc add", "dvc", "add", "-q", f"data/raw/{LINE}")
    step("prepare", sys.executable, "-m", "pipelines.prepare", LINE)
    step("repro of prepare", "dvc", "repro", "-q", f"prepare@{LINE}")
    last = f"prepare@{LINE}"
    if with_extract:
        last = f"extract@{LINE}"
        step("extract", sys.executable, "-m", "pipelines.extract", LINE)
        step("extract, nothing to do", sys.executable, "-m", "pipelines.extract", LINE)
        step("repro of extract", "dvc", "repro", "-q", last)
        pretend(root, [LINE], ("train", "evaluate", "register"))
        last = f"register@{LINE}"
    step("repro, nothing to do", "dvc", "repro", last)
    step("status", "dvc", "status", last)
    added = int(images * ADDED_SHARE)
    write_images(raw, range(images, images + added))
    step("dvc add, 1 % added", "dvc", "add", "-q", f"data/raw/{LINE}")
    step("prepare, 1 % added", sys.executable, "-m", "pipelines.prepare", LINE)
    if with_extract:
        step("extract, 1 % added", sys.executable, "-m", "pipelines.extract", LINE)
    shutil.rmtree(raw)
    (raw.parent / f"{LINE}.dvc").unlink()
    return steps


def many_lines(root: Path) -> Step:
    """Small lines whose stages are all done, as far as DVC can see: their outputs are little files."""
    lines = [f"line-{number:02d}" for number in range(LINES)]
    configure(root, dict.fromkeys(lines, SECTIONS))
    (root / "dvc.lock").unlink(missing_ok=True)
    for number, line in enumerate(lines):
        write_images(root / "data/raw" / line, range(number * 20, number * 20 + 20))
    finished(start(root, "dvc", "add", "-q", *(f"data/raw/{line}" for line in lines)))
    pretend(root, lines, ("prepare", "extract", "train", "evaluate", "register"))
    step = measured("status of all lines", LINES * 20, lambda: start(root, "dvc", "status"))
    said = subprocess.run(
        ["dvc", "status"], cwd=root, env=environment(root), capture_output=True, text=True, check=True
    )
    if "up to date" not in said.stdout:
        raise SystemExit(f"dvc status of {LINES} lines that are done: {said.stdout[:1000]}")
    return step


def make_project(root: Path) -> None:
    """What git knows of the project, without what it has produced; a tiny backbone with random weights."""
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (PROJECT / name).is_file() and not name.endswith(("dvc.lock", ".dvc")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, root / name)
    finished(start(root, "git", "init", "-q"))
    save_tensors(root / "random.safetensors", timm.create_model("test_resnet").state_dict())


def configure(root: Path, lines: dict[str, Any]) -> None:
    """Write params.yaml: the project's own with these lines, and the tiny backbone."""
    params = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    params["extract"]["backbone"] |= {
        "name": "test_resnet",
        "weights": "random.safetensors",
        "sha256": sha256_file(root / "random.safetensors"),
        "levels": [2],
        "image_size": [SIDE, SIDE],
    }
    params |= {"fetch": {}, "lines": lines}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def write_images(raw: Path, numbers: Sequence[int]) -> None:
    """Grey pictures: a coarse noise of their own on that of their group; every hundredth is anomalous, with a mask."""
    for folder in ("good", "bad/dent", "masks/dent"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    coarse = SIDE // 8
    for number in numbers:
        group = number % GROUPS
        base_YX = np.random.default_rng(group).normal(128, 15, (coarse, coarse))
        own = np.random.default_rng([1, number])
        level_YX = np.kron(base_YX + own.normal(0, 15, base_YX.shape), np.ones((8, 8)))
        grey_YX = np.clip(level_YX + own.normal(0, 12, level_YX.shape), 0, 255).astype(np.uint8)
        name, bad = f"part{group:03d}_{number:06d}.png", number % 100 == 99
        if bad:
            mask_YX = np.zeros((SIDE, SIDE), dtype=np.uint8)
            mask_YX[10:20, 10:30] = 255
            grey_YX[10:20, 10:30] //= 2
            Image.fromarray(mask_YX).save(raw / "masks/dent" / name, compress_level=1)
        Image.fromarray(grey_YX).save(raw / ("bad/dent" if bad else "good") / name, compress_level=1)


def pretend(root: Path, lines: Sequence[str], stages: Sequence[str]) -> None:
    """Leave a little file for every output of these stages, and have DVC believe that they made it of today's code."""
    finished(start(root, "dvc", "repro", "-q", *(f"code-{stage}" for stage in ("fetch", *SECTIONS))))
    declared = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for line in lines:
        for stage in stages:
            body = declared[stage]["do"]
            for out in (*body.get("outs", ()), *body.get("plots", ()), *body.get("metrics", ())):
                path = root / (out if isinstance(out, str) else next(iter(out))).replace("${key}", line)
                path = path if path.suffix else path / "content"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{stage} of {line}", encoding="utf-8")
    done = [f"{stage}@{line}" for line in lines for stage in stages]
    finished(python(root, "import sys; from pipelines.adapters.dvc_lock import commit; commit(sys.argv[1:])", *done))


READ_AND_HASH = """
import hashlib, os, sys
for top, _, names in os.walk(sys.argv[1]):
    for name in names:
        with open(os.path.join(top, name), "rb") as file:
            data = file.read()
        hashlib.sha256(data).hexdigest(), hashlib.md5(data).hexdigest()
"""


def python(root: Path, code: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """A process of this Python."""
    return start(root, sys.executable, "-c", code, *arguments)


def start(root: Path, *command: str) -> "subprocess.Popen[bytes]":
    """A command in the copy of the project, its output thrown away."""
    return subprocess.Popen(command, cwd=root, env=environment(root), stdout=subprocess.DEVNULL)


def environment(root: Path) -> dict[str, str]:
    """Of the commands: the copy's code, and nothing of this checkout's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WTFLOW_")}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(root), "DVC_NO_ANALYTICS": "1"}


def finished(process: "subprocess.Popen[bytes]") -> None:
    """Wait; a command that fails ends the benchmark."""
    if process.wait():
        raise SystemExit(f"{process.args!r} failed with status {process.returncode}")


def measured(
    name: str, images: int, begin: Callable[[], "subprocess.Popen[bytes]"], plain: float | None = None
) -> Step:
    """Run a command to its end, and look at its processes ten times a second."""
    started, before, peak = time.perf_counter(), os.times(), 0
    process = begin()
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.1)
    finished(process)
    seconds, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    step = Step(name, images, seconds, cpu, peak / 1e9, seconds / plain if plain else None)
    print(json.dumps(asdict(step)), flush=True)  # noqa: T201
    return step


def _memory(pid: int) -> int:
    """Bytes of a process and all below it, what they share counted once."""
    found = 0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            found += process.memory_full_info().pss
    except psutil.Error:  # it has ended meanwhile
        pass
    return found


if __name__ == "__main__":
    main()
