"""Pixel figures of 26 Mpx: the mergeable histogram against sorting every pixel. Seconds as a ratio, and the error.

Both get the same maps in the same process, one after the other. The tests hold the exact way to a slow reference.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.report import at_least, at_most, parse_no_arguments, publish
from wtflow.scoring.metrics import EIGHT_NEIGHBOURS, PixelMetrics

SIDE, WORKERS = 256, 4
FIGURES = ("pixel_auroc", "pixel_ap", "aupro_30", "aupro_05")
CASES = (("energies", 0.5, 400), ("narrow", 0.02, 40), ("heavy tail", 4.0, 40))
"""Name, standard deviation of the log of a normal pixel's score, images of 256 x 256 pixels."""
Pixels = Sequence[tuple[NDArray[np.float32], NDArray[np.bool_]]]


def pixels(images: int, spread: float, seed: int = 0) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Smooth maps; every second one has one to three rectangles, of higher scores on the whole."""
    rng = np.random.default_rng(seed)
    for number in range(images):
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        for _ in range(int(rng.integers(1, 4)) * (number % 2)):
            (row, column), (height, width) = rng.integers(0, SIDE - 40, 2), rng.integers(4, 40, 2)
            mask[row : row + height, column : column + width] = True
        field = ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), 4.0)
        field = field / field.std() + 2.0 * ndimage.gaussian_filter(mask.astype(np.float64), 3.0)
        yield np.exp(spread * field).astype(np.float32), mask


def exact(images: Pixels) -> tuple[float, ...]:
    """`FIGURES`, from every single pixel: one sort, ties merged, nothing else."""
    scores, truth, shares = [], [], []
    for anomaly_map, mask in images:
        regions, _ = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
        scores.append(anomaly_map.ravel())
        truth.append(mask.ravel())
        shares.append(np.where(mask, 1.0 / np.bincount(regions.ravel())[regions], 0.0).ravel())
    score, is_anomalous = np.concatenate(scores), np.concatenate(truth)
    order = np.argsort(score)[::-1]
    last_of_its_ties = np.append(np.diff(score[order]) != 0, True)
    fpr, tpr, pro = (
        np.append(0.0, np.cumsum(row[order], dtype=np.float64)[last_of_its_ties])
        for row in (~is_anomalous, is_anomalous, np.concatenate(shares))
    )
    precision = tpr[1:] / (tpr + fpr)[1:]
    fpr, tpr, pro = fpr / fpr[-1], tpr / tpr[-1], pro / pro[-1]
    ap = float(np.sum(np.diff(tpr) * precision))
    return float(np.trapezoid(tpr, fpr)), ap, _area(fpr, pro, 0.30), _area(fpr, pro, 0.05)


def accumulated(images: Pixels) -> tuple[float, ...]:
    """`FIGURES` of accumulators of `WORKERS` parts, added up."""
    parts = [PixelMetrics() for _ in range(WORKERS)]
    for number, (anomaly_map, mask) in enumerate(images):
        parts[number % WORKERS].add(anomaly_map, mask)
    return astuple(sum(parts, PixelMetrics()).result())


def _area(fpr: NDArray[np.float64], pro: NDArray[np.float64], limit: float) -> float:
    inside = fpr <= limit
    x, y = np.append(fpr[inside], limit), np.append(pro[inside], np.interp(limit, fpr, pro))
    return float(np.trapezoid(y, x)) / limit


def compared(name: str, spread: float, images: int) -> dict[str, Any]:
    """One row: both ways on the same maps, seconds of this process's CPU time."""
    maps = list(pixels(images, spread))
    start = time.process_time()
    fast = accumulated(maps)
    middle = time.process_time()
    slow = exact(maps)
    fast_s, slow_s = middle - start, time.process_time() - middle
    error = max(abs(ours - theirs) for ours, theirs in zip(fast, slow, strict=True))
    times = {"histogram_s": round(fast_s, 2), "exact_s": round(slow_s, 2), "ratio": round(slow_s / fast_s, 2)}
    size = {"scores": name, "megapixels": round(images * SIDE**2 / 1e6, 1)}
    return size | times | dict(zip(FIGURES, fast, strict=True)) | {"error_millionths": round(1e6 * error, 3)}


def main() -> None:
    """Run it."""
    parse_no_arguments(__doc__ or "", "python -m benchmarks.metrics")
    rows = [compared(*case) for case in CASES]
    worst = max(row["error_millionths"] for row in rows)
    publish(
        "metrics",
        rows,
        [
            at_least("26 Mpx: pixel figures, times faster than sorting every pixel", rows[0]["ratio"], 2.0),
            at_most("pixel figures of smooth maps: largest error, millionths", worst, 10.0),
        ],
    )


if __name__ == "__main__":
    main()
