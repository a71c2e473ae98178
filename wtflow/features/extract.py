"""Photographs -> feature shards, a partition at a time.

    manifest rows --read--> bytes --decode--> Y x X x 3 uint8 --infer--> {level: C x H x W float16} --write--> partition

A partition is one idempotent task: its file holds the digest of what went in, and is renamed into place when it is
whole. A killed run continues behind the last whole partition. Where the tasks run is the caller's business.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wtflow.artefact import canonical_json, digest_of, save_tensors, sha256_bytes
from wtflow.data.images import ImageLimits, decode, preprocess
from wtflow.data.manifest import REJECTED_SCHEMA, write_rejected
from wtflow.data.shards import REJECTED, part_name, seal
from wtflow.errors import ImageError, WTFlowError
from wtflow.features.backbone import Backbone, BackboneParams
from wtflow.params import Section


class ExtractParams(Section):
    """Settings of the extract stage."""

    backbone: BackboneParams
    partition_size: Annotated[int, Field(gt=0)]
    """Images a shard."""
    batch_size: Annotated[int, Field(gt=0)]
    """Images a pass through the backbone."""


@dataclass
class Timing:
    """What one partition, or the sum of several, took, in seconds."""

    images: int = 0
    rejected: int = 0
    read: float = 0.0
    decode: float = 0.0
    infer: float = 0.0
    write: float = 0.0

    def __add__(self, other: "Timing") -> "Timing":
        return Timing(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def seconds(self) -> float:
        """Read, decode, infer and write together."""
        return self.read + self.decode + self.infer + self.write


@dataclass(frozen=True)
class Partition:
    """What is in a partition's file: the images' places in the manifest, those left out and why, and the timing."""

    kept: list[int]
    rejected: list[dict[str, str]]
    timing: Timing
    reused: bool


def extract(
    rows: Sequence[dict[str, Any]],
    raw: Path,
    folder: Path,
    backbone: Backbone,
    params: ExtractParams,
    limits: ImageLimits,
    facts: dict[str, Any],
    on_partition: Callable[[int, Partition], None] = lambda number, partition: None,
) -> pa.Table:
    """Fill `folder` with the features of manifest `rows`, continuing what is there, and seal it.

    Returns the rejected images, which are recorded beside the features: each row is in one table or the other.
    Partitions of other images, settings or weights are overwritten. `folder` is a working place; rename it to where
    readers look.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backbone_digest = backbone.digest
    kept, rejected = [], []
    for number, start in enumerate(range(0, len(rows), params.partition_size)):
        chunk = rows[start : start + params.partition_size]
        wanted = digest_of([backbone_digest, params.batch_size, [row["image_id"] for row in chunk]])
        path = folder / part_name(number)
        partition = _reuse(path, wanted) or _compute(path, wanted, chunk, raw, backbone, params, limits)
        kept += [{**chunk[place], "partition": number, "row": row} for row, place in enumerate(partition.kept)]
        rejected += partition.rejected
        on_partition(number, partition)
    if not kept:
        raise WTFlowError(f"{raw}: none of {len(rows)} images could be read. See {folder} and the manifest's paths.")
    if len(kept) + len(rejected) != len(rows):
        raise WTFlowError(
            f"{folder}: {len(rows)} images in, {len(kept)} kept, {len(rejected)} rejected. Remove it and extract again."
        )
    left_out = pa.Table.from_pylist(sorted(rejected, key=lambda one: one["path"]), schema=REJECTED_SCHEMA)
    write_rejected(left_out, folder / REJECTED)
    save_tensors(folder / "backbone.safetensors", backbone.network.state_dict())
    seal(
        folder,
        pa.Table.from_pylist(kept),
        params.backbone.levels,
        {"backbone_digest": backbone_digest, "rejected": left_out.num_rows, **facts},
    )
    return left_out


def _reuse(path: Path, wanted: str) -> Partition | None:
    """A partition that an earlier run finished; not one with rejected images, which may have been restored since."""
    try:
        with safe_open(path, framework="pt") as file:
            noted = json.loads(file.metadata()["wtflow"])
    except (FileNotFoundError, SafetensorError, TypeError, KeyError):
        return None
    if noted["inputs"] != wanted or noted["rejected"]:
        return None
    return Partition(noted["kept"], [], Timing(images=len(noted["kept"])), reused=True)


def _compute(
    path: Path,
    wanted: str,
    chunk: Sequence[dict[str, Any]],
    raw: Path,
    backbone: Backbone,
    params: ExtractParams,
    limits: ImageLimits,
) -> Partition:
    timing = Timing()
    pictures, kept, rejected = [], [], []
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        loaded = pool.map(lambda row: _load(raw, row, params.backbone.image_size, limits), chunk)
        for place, (row, picture) in enumerate(zip(chunk, loaded, strict=True)):
            timing.read, timing.decode = timing.read + picture.read, timing.decode + picture.decode
            if picture.pixels is None:
                rejected.append({"path": row["path"], "line": row["line"], **picture.problem})
            else:
                pictures.append(picture.pixels)
                kept.append(place)
    timing.images, timing.rejected = len(kept), len(rejected)
    started = time.perf_counter()
    maps = _infer(pictures, backbone, params.batch_size)
    if not all(maps_NCHW.isfinite().all() for maps_NCHW in maps.values()):
        raise WTFlowError(
            f"extract.backbone: {params.backbone.name} gives features beyond float16's 65504 at the levels "
            f"{list(params.backbone.levels)}. Choose other levels or another backbone."
        )
    inferred = time.perf_counter()
    noted = canonical_json({"inputs": wanted, "kept": kept, "rejected": rejected})
    save_tensors(path, maps, metadata={"wtflow": noted})
    timing.infer, timing.write = inferred - started, time.perf_counter() - inferred
    return Partition(kept, rejected, timing, reused=False)


@dataclass(frozen=True)
class _Picture:
    pixels: np.ndarray | None
    problem: dict[str, str]
    read: float
    decode: float


def _load(raw: Path, row: dict[str, Any], size: tuple[int, int], limits: ImageLimits) -> _Picture:
    started = time.perf_counter()
    pixels, problem = None, {}
    try:
        data = (raw / row["path"]).read_bytes()
    except OSError as error:
        return _Picture(None, {"reason": "unreadable", "detail": str(error)}, time.perf_counter() - started, 0.0)
    read = time.perf_counter()
    if sha256_bytes(data) != row["image_id"]:
        problem = {"reason": "changed", "detail": "not the bytes that the manifest recorded; prepare again"}
    else:
        try:
            pixels = preprocess(decode(data, limits), size)
        except ImageError as error:
            problem = {"reason": error.reason, "detail": str(error)}
    return _Picture(pixels, problem, read - started, time.perf_counter() - read)


def _infer(pictures: Sequence[NDArray[np.uint8]], backbone: Backbone, batch_size: int) -> dict[str, Tensor]:
    """On a GPU in batches; on a CPU picture by picture, one to a thread, which scales where threads inside a
    depthwise convolution do not."""
    device = backbone.mean_C11.device
    size = batch_size if device.type == "cuda" else 1
    batches = [torch.from_numpy(np.stack(pictures[start : start + size])) for start in range(0, len(pictures), size)]
    if device.type == "cuda":
        passes = [backbone(batch_BYX3.pin_memory().to(device, non_blocking=True)) for batch_BYX3 in batches]
    else:
        with _one_thread_each() as cores, ThreadPoolExecutor(max_workers=cores) as pool:
            passes = list(pool.map(backbone, batches))
    levels = backbone.params.levels if passes else ()
    return {f"level{level}": torch.cat([maps[level].cpu() for maps in passes]) for level in levels}


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Operators of one thread inside; yields how many threads they had, which is how many may run side by side."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)
