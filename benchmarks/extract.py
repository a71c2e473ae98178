"""Extraction from files to sealed shards, against the bare backbone on pictures that are in memory already.

Both take the same pictures with the same threads, in turns; what is compared are medians. The bare backbone runs as
extraction runs it, a picture to a thread, the faster way on a CPU. `cpu_ms` is processor time of an image, which a
machine that others use too disturbs less than the clock; the columns behind it say where the threads' milliseconds on
the clock go. `least` and `greatest` are the shares of single turns.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
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
        found, share = measured(name, folder, paths, backbone, params)
        rows += found
        claims.append(at_least(f"extraction of {name}, throughput as a share of the bare backbone's", share, 0.9))
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
) -> tuple[list[dict[str, Any]], float]:
    """Rows of a data set, and extraction's share of the bare throughput."""
    pictures = [
        torch.from_numpy(preprocess(decode(path.read_bytes(), ImageLimits()), params.backbone.image_size))[None]
        for path in paths
    ]
    manifest = [
        {"image_id": sha256_file(path), "path": str(path.relative_to(folder)), "line": name, "split": "train"}
        for path in paths
    ]
    seconds: dict[str, list[float]] = {"bare": [], "extraction": []}
    cpu: dict[str, list[float]] = {"bare": [], "extraction": []}
    done: list[Extraction] = []
    for repeat in range(REPEATS + 1):  # the first one warms up
        used = [time.process_time()]
        timed = {"bare": bare(pictures, backbone)}
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
    return rows, middle["bare"] / middle["extraction"]


def bare(pictures: Sequence[Tensor], backbone: Backbone) -> float:
    """Seconds, a picture to a thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=threads) as pool:
            began = time.perf_counter()
            for _ in pool.map(backbone, pictures):
                pass
            return time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
