"""Extraction from files to sealed shards, against the bare backbone on pictures that are in memory already.

All take the same pictures with the same threads, in turns; what is compared are medians. `bare` is the network in fewer
operations (`wtflow.features.lean`) as extraction runs it, a picture to a thread, the faster way on a CPU; the two
`timm` rows are the network as timm builds it, in the same way and in batches. `cpu_ms` is processor time of an image,
which a machine that others use too disturbs less than the clock; the columns behind it say where the threads'
milliseconds on the clock go. `least` and `greatest` are the shares of single turns.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.product_lines import PROJECT
from benchmarks.report import Claim, at_least, parse_no_arguments, publish
from pipelines.lines import read_params
from wtflow.artefact import sha256_file
from wtflow.data.images import ImageLimits, decode, preprocess
from wtflow.features.backbone import Backbone, build_backbone
from wtflow.features.cache import FeatureCache
from wtflow.features.extract import Extraction, ExtractParams, Job, extract

IMAGES, REPEATS = 256, 5
PARTS = ("read", "decode", "infer", "write")


def main() -> None:
    """Run it."""
    parse_no_arguments(__doc__ or "", "make bench NAME=extract")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    params = ExtractParams.parse(read_params(PROJECT / "params.yaml")["extract"], "params.yaml: extract")
    backbone = build_backbone(params.backbone)
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    for name, folder in photographs().items():
        paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))[:IMAGES]
        found, seconds = measured(name, folder, paths, backbone, params)
        rows += found
        timm = min(seconds["timm"], seconds["timm, in batches"])
        named = f"extraction of {name}, throughput as a share of"
        claims.append(at_least(f"{named} that of timm's network", timm / seconds["extraction"], 0.9))
        claims.append(at_least(f"{named} the bare backbone's", seconds["bare"] / seconds["extraction"], 0.9))
    publish("extract", rows, claims)


def photographs() -> dict[str, Path]:
    """Folders of real images that are at hand."""
    spec = find_spec("elpv_dataset")
    found = {"elpv": Path(spec.origin).parent / "data/images"} if spec and spec.origin else {}
    if "WTFLOW_SHARED_DATA" in os.environ:
        found["magnetic-tile"] = Path(os.environ["WTFLOW_SHARED_DATA"], "magnetic_tile/train")
    return found


def measured(
    name: str, folder: Path, paths: Sequence[Path], backbone: Backbone, params: ExtractParams
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of a data set, and the seconds of each."""
    pictures = [
        torch.from_numpy(preprocess(decode(path.read_bytes(), ImageLimits()), params.backbone.image_size))[None]
        for path in paths
    ]
    manifest = [
        {"image_id": sha256_file(path), "path": str(path.relative_to(folder)), "line": name, "split": "train"}
        for path in paths
    ]
    ways: dict[str, Callable[[], float]] = {
        "bare": lambda: side_by_side(pictures, backbone),
        "timm": lambda: side_by_side(pictures, lambda picture: as_built(picture, backbone)),
        "timm, in batches": lambda: in_batches(pictures, backbone, params.batch_size),
    }
    seconds: dict[str, list[float]] = {what: [] for what in (*ways, "extraction")}
    cpu: dict[str, list[float]] = {what: [] for what in seconds}
    done: list[Extraction] = []
    for repeat in range(REPEATS + 1):  # the first one warms up
        used = [time.process_time()]
        timed = {}
        for what, way in ways.items():
            timed[what] = way()
            used.append(time.process_time())
        with tempfile.TemporaryDirectory(dir=PROJECT) as place:
            job = Job(folder, FeatureCache(Path(place, "cache")), backbone, params, ImageLimits())
            began = time.perf_counter()
            extraction = extract(manifest, Path(place, "fit"), job, {})
            timed["extraction"] = time.perf_counter() - began
            used.append(time.process_time())
        if repeat:
            done.append(extraction)
            for what, value, start, end in zip(timed, timed.values(), used[:-1], used[1:], strict=True):
                seconds[what].append(value)
                cpu[what].append(end - start)
    middle = {what: statistics.median(values) for what, values in seconds.items()}
    rows: list[dict[str, Any]] = [
        {
            "images": name,
            "what": what,
            "images_per_s": round(len(paths) / value, 1),
            "share_of_bare": round(middle["bare"] / value, 3),
            "least": round(min(b / v for b, v in zip(seconds["bare"], seconds[what], strict=True)), 3),
            "greatest": round(max(b / v for b, v in zip(seconds["bare"], seconds[what], strict=True)), 3),
            "cpu_ms": round(1000 * statistics.median(cpu[what]) / len(paths), 2),
        }
        for what, value in middle.items()
    ]
    for part in PARTS:
        spent = statistics.median(getattr(one.timing, part) for one in done)
        rows[-1][f"{part}_ms"] = round(1000 * spent / len(paths), 2)
    return rows, middle


@torch.inference_mode()
def as_built(image_BYX3: Tensor, backbone: Backbone) -> list[Tensor]:
    """What the backbone gives, by timm's own operations."""
    return [map_BCHW.half() for map_BCHW in backbone.network(backbone.normalised(image_BYX3))]


def in_batches(pictures: Sequence[Tensor], backbone: Backbone, size: int) -> float:
    """Seconds of `as_built`, the threads inside its operators."""
    began = time.perf_counter()
    for start in range(0, len(pictures), size):
        as_built(torch.cat(list(pictures[start : start + size])), backbone)
    return time.perf_counter() - began


def side_by_side(pictures: Sequence[Tensor], network: Callable[[Tensor], object]) -> float:
    """Seconds, a picture to a thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=threads) as pool:
            began = time.perf_counter()
            for _ in pool.map(network, pictures):
                pass
            return time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
