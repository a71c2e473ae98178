"""One method on one line, in a process of its own: fit to the training images, score the others, note what it cost.

    python -m benchmarks.contest.contender <folder>

`folder` holds job.json. Left beside it: facts.json, calibrate.safetensors and test.safetensors with {"scores": N
float64, "maps": N x Y x X float32}. No label and no threshold comes here. Started by `benchmarks.contest.trial`.
"""

import importlib
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.contest.pictures import read_pictures
from wtflow.artefact import read_json, save_tensors, write_json

BATCH = 8
REPEATS = 30


@dataclass(frozen=True)
class Inputs:
    """What a contender may look at while it learns."""

    images_NYX3: Tensor
    """Training images, uint8."""
    fit: Path
    """The same images' cached features, for our own methods."""
    backbone: dict[str, Any]
    """Settings of the backbone that all share."""
    scratch: Path
    """A folder that is removed afterwards."""


class Contender(Protocol):
    """A method. Its module has `build(settings, seed, inputs) -> Contender`, which does not learn yet."""

    def fit(self) -> None:
        """Learn from the inputs."""

    def embed(self, images_BYX3: Tensor) -> object:
        """The backbone alone; None if the method has none."""

    def score(self, images_BYX3: Tensor) -> tuple[Tensor, Tensor]:
        """Image scores [B] and maps [B, Y, X] of the images' size, larger for more anomalous, the method's own way."""

    def tensors(self) -> Iterable[Tensor]:
        """All that has to be shipped to score an image, the backbone included."""


def main(folder: Path) -> None:
    """Run the job in `folder`."""
    job = read_json(folder / "job.json")
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    torch.set_num_threads(threads)
    torch.manual_seed(job["seed"])
    pictures = Path(job["pictures"])
    inputs = Inputs(read_pictures(pictures, "train"), Path(job["fit"]), job["backbone"], folder)
    contender: Contender = importlib.import_module(job["module"]).build(job["settings"], job["seed"], inputs)
    started, cpu = time.perf_counter(), time.process_time()
    contender.fit()
    facts: dict[str, float | None] = {
        "train_seconds": time.perf_counter() - started,
        "train_cpu_seconds": time.process_time() - cpu,
        "threads": threads,
        "train_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "model_bytes": _bytes(contender.tensors()),
    }
    for split in ("calibrate", "test"):
        _write_scores(contender, read_pictures(pictures, split), folder / f"{split}.safetensors", job["maps"])
    facts |= latency(contender, read_pictures(pictures, "calibrate")[:1])
    facts["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    write_json(folder / "facts.json", facts)


@torch.no_grad()
def _write_scores(contender: Contender, images_NYX3: Tensor, path: Path, maps: bool) -> None:
    found = [contender.score(batch_BYX3) for batch_BYX3 in torch.split(images_NYX3, BATCH)]
    named = {"scores": torch.cat([score_B for score_B, _ in found]).double()}
    if maps:
        named["maps"] = torch.cat([map_BYX for _, map_BYX in found]).float()
    save_tensors(path, named)


@torch.no_grad()
def latency(contender: Contender, image_1YX3: Tensor) -> dict[str, float | None]:
    """Median milliseconds of one image on one thread, in processor time, which other processes stretch less. The head
    is what the whole takes beyond the backbone; both are timed in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    backbone, whole = [], []
    for _ in range(REPEATS):
        backbone.append(_milliseconds(lambda: contender.embed(image_1YX3)))
        whole.append(_milliseconds(lambda: contender.score(image_1YX3)))
    torch.set_num_threads(threads)
    has_backbone = contender.embed(image_1YX3) is not None
    middle = statistics.median(backbone) if has_backbone else 0.0
    return {
        "backbone_ms": middle if has_backbone else None,
        "head_ms": statistics.median(whole) - middle,
        "image_ms": statistics.median(whole),
    }


def _milliseconds(work: Any) -> float:
    started = time.thread_time()
    work()
    return 1000 * (time.thread_time() - started)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once, however many tensors share it."""
    seen = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel()}
    return sum(seen.values())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
