"""The backbone made lean (`wtflow/features/lean.py`) beside timm's network as it comes, one photograph at a time.

Both see the same pixels in the same process, in turns; seconds are medians, on one thread and on all. The difference is
the largest of a feature, as a share of the largest feature of its level.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.product_lines import PROJECT
from benchmarks.report import at_least, at_most, parse_no_arguments, publish
from pipelines.lines import read_params
from wtflow.features.backbone import build_backbone
from wtflow.features.extract import ExtractParams

TURNS, EACH, WARM_UPS = 15, 5, 3


def main() -> None:
    """Run it."""
    parse_no_arguments(__doc__ or "", "make bench NAME=backbone")
    params = ExtractParams.parse(read_params(PROJECT / "params.yaml")["extract"], "params.yaml: extract")
    backbone = build_backbone(params.backbone)
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, *params.backbone.image_size, 3), generator=noise, dtype=torch.uint8)
    lean_13YX = backbone.normalised(pixels)
    plain_13YX = lean_13YX.contiguous()
    ways = {"timm": lambda: backbone.network(plain_13YX), "lean": lambda: backbone.lean(lean_13YX)}
    with torch.inference_mode():
        difference = max(
            float((one - other).abs().max() / one.abs().max())
            for one, other in zip(ways["timm"](), ways["lean"](), strict=True)
        )
        rows: list[dict[str, Any]] = []
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            torch.set_num_threads(threads)
            ms = in_turns(ways)
            rows += [{"what": what, "threads": threads, "ms": round(ms[what], 2)} for what in ways]
            rows[-1]["times_faster"] = round(ms["timm"] / ms["lean"], 2)
    rows[-1]["difference_millionths"] = round(1e6 * difference, 2)
    publish(
        "backbone",
        rows,
        [
            at_least("backbone, one image on one thread: times faster than timm's", rows[1]["times_faster"], 1.3),
            at_most("backbone: features' difference to timm's, millionths of the largest", 1e6 * difference, 10),
        ],
    )


def in_turns(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each way: the median of `TURNS` turns."""
    ms: dict[str, list[float]] = {what: [] for what in ways}
    for turn in range(WARM_UPS + TURNS):
        for what, call in ways.items():
            began = time.perf_counter()
            for _ in range(EACH):
                call()
            if turn >= WARM_UPS:
                ms[what].append(1000 * (time.perf_counter() - began) / EACH)
    return {what: statistics.median(values) for what, values in ms.items()}


if __name__ == "__main__":
    main()
