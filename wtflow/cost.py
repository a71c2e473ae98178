"""What it takes to score one photograph: parameters, multiply-accumulates, and milliseconds on the machine at hand."""

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wtflow.detector import Detector
from wtflow.features.extract import one_thread_each

WARM_UPS, REPEATS = 3, 20


@dataclass(frozen=True)
class Cost:
    """Of the two parts of a detector. The head is all that comes behind the backbone."""

    backbone: float
    head: float


def parameters(detector: Detector) -> Cost:
    """Weights of the backbone and of the velocity field; statistics that are buffers are not counted."""
    return Cost(_parameters(detector.backbone.network), _parameters(detector.scorer.field))


def multiply_accumulates(detector: Detector) -> Cost:
    """Of convolutions and matrix products for one photograph; resizing, norms and activations are not counted."""
    image_BYX3, levels = _photograph(detector)
    return Cost(_counted(lambda: detector.backbone(image_BYX3)), _counted(lambda: detector.scorer(levels)))


def milliseconds(detector: Detector, clock: Callable[[], float] = time.perf_counter) -> Cost:
    """Median of `REPEATS` single photographs on one thread of this machine, decoding and resizing left out.

    With `time.thread_time` for a clock without the waiting for a core that others use.
    """
    image_BYX3, levels = _photograph(detector)
    with one_thread_each():
        return Cost(
            _median_ms(lambda: detector.backbone(image_BYX3), clock), _median_ms(lambda: detector.scorer(levels), clock)
        )


def machine() -> str:
    """Processor and usable cores, as a time has to be read with them."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return f"{found[1] if found else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def _photograph(detector: Detector) -> tuple[Tensor, dict[int, Tensor]]:
    """Pixels that show nothing, and their features: neither the count nor the time depends on what is seen."""
    noise = torch.Generator().manual_seed(0)
    image_BYX3 = torch.randint(0, 256, (1, *detector.image_size, 3), dtype=torch.uint8, generator=noise)
    image_BYX3 = image_BYX3.to(detector.backbone.device)
    return image_BYX3, detector.backbone(image_BYX3)


def _parameters(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def _counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _of_addmm_}) as counter:
        call()
    return int(counter.get_total_flops()) // 2  # it counts the product and the sum


def _of_addmm_(_: object, left: Sequence[int], right: Sequence[int], **__: object) -> int:
    """Operations of a product of these shapes that is added in place: the one kind that torch's counter leaves out."""
    return 2 * left[0] * left[1] * right[1]


def _median_ms(call: Callable[[], object], clock: Callable[[], float]) -> float:
    seconds = []
    for _ in range(WARM_UPS + REPEATS):
        started = clock()
        call()
        seconds.append(clock() - started)
    return 1000 * statistics.median(seconds[WARM_UPS:])
