"""Photographs -> feature shards: what the cache has is taken from there, the rest is computed a partition at a time.

    manifest rows --read--> bytes --decode--> Y x X x 3 uint8 --infer--> {level: C x H x W float16} --write--> cache
                                                                       cache --link, or gather and write--> partition

A partition is one idempotent task: its file is renamed into place when it is whole, and holds the digest of what went
in. A killed run continues behind the partitions that are in the cache. Where the tasks run is the caller's business.
"""

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from wtflow.artefact import canonical_json, digest_of, save_tensors, sha256_bytes
from wtflow.data.images import ImageLimits, decode, preprocess
from wtflow.data.manifest import REJECTED_SCHEMA, write_table
from wtflow.data.shards import REJECTED, part_name, seal
from wtflow.errors import ImageError, WTFlowError
from wtflow.features.augment import AugmentParams, source_of, varied
from wtflow.features.backbone import Backbone, BackboneParams
from wtflow.features.cache import FeatureCache, Place, Shelf
from wtflow.features.links import link
from wtflow.params import Section

Rows = Sequence[dict[str, Any]]
AHEAD = 2
"""Partitions that are read while one is computed and one is written."""


class ExtractParams(Section):
    """Settings of the extract stage."""

    backbone: BackboneParams
    partition_size: Annotated[int, Field(gt=0)]
    """Images a shard, at most."""
    batch_size: Annotated[int, Field(gt=0)]
    """Images a pass through the backbone."""
    augment: AugmentParams = AugmentParams()
    """Copies of the training images of a small line."""


@dataclass
class Timing:
    """What one partition, or the sum of several, took: seconds of threads, several of which work at a time."""

    images: int = 0
    """That were computed."""
    cached: int = 0
    """That were in the cache."""
    rejected: int = 0
    read: float = 0.0
    decode: float = 0.0
    infer: float = 0.0
    write: float = 0.0

    def __add__(self, other: "Timing") -> "Timing":
        return Timing(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Job:
    """What the partitions of an extraction have in common."""

    raw: Path
    """Where the rows' paths start."""
    cache: FeatureCache
    backbone: Backbone
    params: ExtractParams
    limits: ImageLimits

    @cached_property
    def shelf(self) -> Shelf:
        """Where the features go."""
        return self.cache.shelf(self.backbone)


@dataclass(frozen=True)
class Partition:
    """Images that were computed together."""

    image_ids: list[str]
    """Row by row."""
    shard: str
    """Of the cache that holds them; "" if none could be read."""
    rejected: list[dict[str, str]]
    """Those left out and why, in the columns of the rejected table."""
    timing: Timing


Compute = Callable[[Job, Sequence[Rows]], Iterator[Partition]]
"""Puts the features of each group of rows into the cache, as a shard, and tells of each as it is done, in any order."""


@dataclass(frozen=True)
class Extraction:
    """What came of a split."""

    rejected: pa.Table
    """Images that are not in the features, by path."""
    timing: Timing


def extract(
    rows: Rows,
    folder: Path,
    job: Job,
    facts: dict[str, Any],
    compute: Compute | None = None,
    on_timing: Callable[[Timing], None] = lambda timing: None,
) -> Extraction:
    """Fill `folder` anew with the features of manifest `rows` (and copies of them: `with_copies`), and seal it. What is
    not in the cache is computed, by `compute_here` if nothing else is given, and is in the cache then.

    Each photograph is in the features, with all its copies, or in the table of rejected images beside them, where it
    is if one of these is not in the cache and cannot be computed. An image that is in the cache is not read: while the
    photographs are all readable, the bytes of the folder do not depend on what the cache had. `folder` is a working
    place; rename it to where readers look.
    """
    with job.cache.held():
        places = job.shelf.find({row["image_id"] for row in rows}, torch.get_num_threads())
        timing = Timing(cached=sum(row["image_id"] in places for row in rows))
        on_timing(timing)
        rejected: dict[str, dict[str, str]] = {}
        groups = missing(rows, places, job.params.partition_size)
        for done in (compute or compute_here)(job, groups) if groups else ():
            places |= {image_id: Place(done.shard, row) for row, image_id in enumerate(done.image_ids)}
            rejected |= {one["path"]: one for one in done.rejected}
            timing = timing + done.timing
            on_timing(done.timing)
        if lost := [row["path"] for row in rows if row["image_id"] not in places and row["path"] not in rejected]:
            raise WTFlowError(f"{job.raw / lost[0]}: neither computed nor rejected, of {len(lost)}. Extract again.")
        for row in rows:
            if row["path"] in rejected:
                places.pop(row["image_id"], None)
        if not places:
            raise WTFlowError(f"{job.raw}: none of {len(rows)} images could be read. See the manifest's paths.")
        started = time.perf_counter()
        left_out = _assemble(rows, folder, job, places, rejected, facts)
        timing.write += time.perf_counter() - started
    return Extraction(left_out, timing)


def partitions(rows: Rows, size: int) -> list[Rows]:
    """The rows in pieces of 1 to `size`, in order. Where a piece ends, the image_id of its last row says, not how many
    rows went before: one image more or less changes its own piece, seldom the next as well, and every other file of
    the features stays what it was, on disk and in DVC's store. Of many rows a piece has some 0.43 `size` on average."""
    pieces, start, every = [], 0, max(1, size // 2)
    for end, row in enumerate(rows, start=1):
        if end - start == size or end == len(rows) or crc32(row["image_id"].encode()) % every == 0:
            pieces.append(rows[start:end])
            start = end
    return pieces


def missing(rows: Rows, places: Mapping[str, Place], size: int) -> list[Rows]:
    """Rows that have to be computed, in groups of at most `size`. A partition of which nothing is there is a group, and
    its shard the output's file; what others lack comes together."""
    groups: list[Rows] = []
    single: list[dict[str, Any]] = []
    for chunk in partitions(rows, size):
        lacking = [row for row in chunk if row["image_id"] not in places]
        if len(lacking) == len(chunk):
            groups.append(chunk)
        else:
            single += lacking
    return groups + [single[start : start + size] for start in range(0, len(single), size)]


def compute_here(job: Job, groups: Sequence[Rows]) -> Iterator[Partition]:
    """In this process: reading and decoding, the backbone, and writing go on side by side.

    On a CPU the thread that decoded a picture takes it through the backbone too, a picture to a thread, which scales
    where threads inside a depthwise convolution do not. On a GPU threads decode the next groups meanwhile.
    """
    on_gpu = job.backbone.device.type == "cuda"
    waiting = deque(groups)
    seen: deque[tuple[Rows, list[Future[_Picture]]]] = deque()
    written: deque[Future[Partition]] = deque()
    with one_thread_each() as cores, _pool(cores) as pool:
        while waiting or seen:
            while waiting and len(seen) <= AHEAD:
                group = waiting.popleft()
                seen.append((group, [pool.submit(_see, job, row, not on_gpu) for row in group]))
            group, futures = seen.popleft()
            pictures = [future.result() for future in futures]
            if on_gpu:
                pictures = _infer(pictures, job)
            written.append(pool.submit(_keep, job, group, pictures))  # behind what waits; one thread more would push in
            if len(written) > 1:
                yield written.popleft().result()
        while written:
            yield written.popleft().result()


@dataclass(frozen=True)
class _Picture:
    pixels: np.ndarray | None
    problem: dict[str, str]
    read: float
    decode: float
    infer: float = 0.0
    maps: dict[int, Tensor] | None = None
    """{level: 1 x C x H x W float16}, on the CPU."""


def _see(job: Job, row: dict[str, Any], infer: bool) -> _Picture:
    picture = _load(job, row)
    if picture.pixels is None or not infer:
        return picture
    started = time.perf_counter()
    maps = job.backbone(torch.from_numpy(picture.pixels)[None])
    return replace(picture, pixels=None, maps=maps, infer=time.perf_counter() - started)


def _load(job: Job, row: dict[str, Any]) -> _Picture:
    started = time.perf_counter()
    pixels, problem = None, {}
    try:
        data = (job.raw / row["path"]).read_bytes()
    except OSError as error:
        return _Picture(None, {"reason": "unreadable", "detail": str(error)}, time.perf_counter() - started, 0.0)
    read = time.perf_counter()
    if sha256_bytes(data) != source_of(row["image_id"]):
        problem = {"reason": "changed", "detail": "not the bytes that the manifest recorded; prepare again"}
    else:
        try:
            picture = varied(decode(data, job.limits), row, job.params.augment)
            pixels = preprocess(picture, job.backbone.params.image_size)
        except ImageError as error:
            problem = {"reason": error.reason, "detail": str(error)}
    return _Picture(pixels, problem, read - started, time.perf_counter() - read)


def _infer(pictures: Sequence[_Picture], job: Job) -> list[_Picture]:
    """On a GPU, in batches."""
    device, result = job.backbone.device, list(pictures)
    whole = [place for place, picture in enumerate(pictures) if picture.pixels is not None]
    for start in range(0, len(whole), job.params.batch_size):
        places, started = whole[start : start + job.params.batch_size], time.perf_counter()
        image_BYX3 = torch.from_numpy(np.stack([pictures[place].pixels for place in places]))  # type: ignore[misc]
        maps = {level: map_BCHW.cpu() for level, map_BCHW in job.backbone(image_BYX3.pin_memory().to(device)).items()}
        seconds = (time.perf_counter() - started) / len(places)
        for row, place in enumerate(places):
            own = {level: map_BCHW[row : row + 1] for level, map_BCHW in maps.items()}
            result[place] = replace(result[place], pixels=None, maps=own, infer=seconds)
    return result


def _keep(job: Job, group: Rows, pictures: Sequence[_Picture]) -> Partition:
    """Write what was computed to the cache."""
    started = time.perf_counter()
    kept = [place for place, picture in enumerate(pictures) if picture.maps is not None]
    rejected = [
        {"path": row["path"], "line": row["line"], **picture.problem}
        for row, picture in zip(group, pictures, strict=True)
        if picture.maps is None
    ]
    levels = job.backbone.params.levels if kept else ()
    maps = {f"level{level}": torch.cat([pictures[place].maps[level] for place in kept]) for level in levels}  # type: ignore[index]
    if not all(torch.stack(map_BCHW.aminmax()).isfinite().all() for map_BCHW in maps.values()):
        raise WTFlowError(
            f"extract.backbone: {job.backbone.params.name} gives features beyond float16's 65504 at the levels "
            f"{list(job.backbone.params.levels)}. Choose other levels or another backbone."
        )
    image_ids = [group[place]["image_id"] for place in kept]
    shard = job.shelf.add(maps, image_ids, _note(job, group, kept, rejected)) if kept else ""
    timing = Timing(images=len(kept), rejected=len(rejected), write=time.perf_counter() - started)
    for picture in pictures:
        timing += Timing(read=picture.read, decode=picture.decode, infer=picture.infer)
    return Partition(image_ids, shard, rejected, timing)


def _note(job: Job, group: Rows, kept: list[int], rejected: list[dict[str, str]]) -> str:
    """What a partition's file says of itself."""
    inputs = digest_of([job.shelf.backbone_digest, job.params.batch_size, [row["image_id"] for row in group]])
    return canonical_json({"inputs": inputs, "kept": kept, "rejected": rejected})


def _assemble(
    rows: Rows,
    folder: Path,
    job: Job,
    places: Mapping[str, Place],
    rejected: Mapping[str, dict[str, str]],
    facts: dict[str, Any],
) -> pa.Table:
    """Write the output from the cache: a partition that is a shard is linked, another one gathered."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    gather = job.shelf.reader()
    index, linked = [], {}
    for number, chunk in enumerate(partitions(rows, job.params.partition_size)):
        kept = [place for place, row in enumerate(chunk) if row["image_id"] in places]
        left_out = [rejected[row["path"]] for row in chunk if row["image_id"] not in places]
        note = _note(job, chunk, kept, left_out)
        found = [places[chunk[place]["image_id"]] for place in kept]
        path = folder / part_name(number)
        if _is_shard(job.shelf, found, note):
            link(job.shelf.file(found[0].shard), path)
            linked[path.name] = found[0].shard
        else:
            save_tensors(path, gather(found), metadata={"wtflow": note})
        index += [{**chunk[place], "partition": number, "row": row} for row, place in enumerate(kept)]
    table = pa.Table.from_pylist(sorted(rejected.values(), key=lambda one: one["path"]), schema=REJECTED_SCHEMA)
    write_table(table, folder / REJECTED)
    save_tensors(folder / "backbone.safetensors", job.backbone.network.state_dict())
    seal(
        folder,
        pa.Table.from_pylist(index),
        job.backbone.params.levels,
        {"backbone_digest": job.shelf.backbone_digest, "rejected": table.num_rows, **facts},
        linked,
    )
    return table


def _is_shard(shelf: Shelf, places: Sequence[Place], note: str) -> bool:
    """Whether the places are all of one shard, in order, which says the same of itself."""
    if not places or places != [Place(places[0].shard, row) for row in range(len(places))]:
        return False
    return shelf.rows(places[0].shard) == len(places) and shelf.note(places[0].shard) == note


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that, when something went wrong, do not begin what has not begun."""
    pool = ThreadPoolExecutor(max_workers=threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Operators of one thread inside; yields how many threads they had, which is how many may run side by side."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)
