"""How well scores part anomalous from normal, images and pixels. Exact: ties are merged, nothing is binned.

A figure that the data do not define (no anomalous image, no mask) is None, never NaN. Scores are raw energy,
larger for more anomalous; nothing clamps or normalises them before. A NaN among them is a `WTFlowError`.

Images: `normal` [N] and `anomalous` [M] scores -> `auroc`, `average_precision`, `f1_max`.
Pixels: `PixelMetrics.add` one (map [H, W], mask [H, W]) an image, then `PixelMetrics.result`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from wtflow.errors import WTFlowError

Scores = NDArray[np.float32] | NDArray[np.float64]
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class BestF1(NamedTuple):
    """The best F1 that any threshold reaches on these very scores, and that threshold: `score >= threshold`.

    An oracle: it has seen the labels. The honest figure is F1 at a threshold that was fixed beforehand.
    """

    f1: float
    threshold: float


@dataclass(frozen=True)
class PixelResult:
    """Pixel figures of one line in [0, 1]; all None without an anomalous pixel (or without a normal one)."""

    pixel_auroc: float | None
    aupro_30: float | None
    aupro_05: float | None


def auroc(normal: ArrayLike, anomalous: ArrayLike) -> float | None:
    """P(anomalous > normal) + P(anomalous = normal) / 2 over all pairs (Mann-Whitney)."""
    negatives, positives = np.sort(_checked(normal)), _checked(anomalous)
    if not (negatives.size and positives.size):
        return None
    below = np.searchsorted(negatives, positives, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(negatives, positives, side="right").sum(dtype=np.int64)
    return float(below + not_above) / (2.0 * negatives.size * positives.size)


def average_precision(normal: ArrayLike, anomalous: ArrayLike) -> float | None:
    """Sum over distinct thresholds of (recall gained) x (precision there). No interpolation."""
    counts = _counts_by_threshold(normal, anomalous)
    if counts is None:
        return None
    recall = counts.true_positives / counts.true_positives[-1]
    precision = counts.true_positives / (counts.true_positives + counts.false_positives)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def f1_max(normal: ArrayLike, anomalous: ArrayLike) -> BestF1 | None:
    """The oracle F1: its maximum over all thresholds. Of equally good ones the largest threshold is named."""
    counts = _counts_by_threshold(normal, anomalous)
    if counts is None:
        return None
    called = counts.true_positives + counts.false_positives
    f1 = 2.0 * counts.true_positives / (called + counts.true_positives[-1])
    best = int(np.argmax(f1))
    return BestF1(float(f1[best]), float(counts.thresholds[best]))


def roc(normal: ArrayLike, anomalous: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corners (FPR, TPR) of the ROC curve, from (0, 0) to (1, 1), one for each distinct score.

    Raises `WTFlowError` unless there are scores of both kinds.
    """
    counts = _counts_by_threshold(normal, anomalous)
    if counts is None or not counts.false_positives[-1]:
        raise WTFlowError("a ROC curve needs at least one normal and one anomalous score.")
    fpr = counts.false_positives / counts.false_positives[-1]
    tpr = counts.true_positives / counts.true_positives[-1]
    return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])


class PixelMetrics:
    """Pixel AUROC and AUPRO of a line, from its test images one by one. All maps have one resolution.

    PRO(t) is the share of a region's pixels with score >= t, averaged over all regions of the line: each
    counts alike, whatever its size and image. A region is an 8-connected component of a mask. FPR(t) is over
    all normal pixels, those of good images included. AUPRO(limit) is the area under PRO over FPR from 0 to
    `limit`, divided by `limit`; the curve starts at (0, 0) and is linear between distinct thresholds.
    """

    def __init__(self) -> None:
        self._resolution: tuple[int, ...] | None = None
        self._regions = 0
        self._normal: list[NDArray[np.float32]] = []
        self._anomalous: list[NDArray[np.float32]] = []
        self._weights: list[NDArray[np.float64]] = []  # of each anomalous pixel: 1 / pixels of its region

    def add(self, anomaly_map: ArrayLike, mask: ArrayLike) -> None:
        """Take one image: map [H, W] of raw scores; mask [H, W] of bool, True where anomalous."""
        scores, truth = _checked(anomaly_map), np.asarray(mask)
        if scores.ndim != 2 or truth.shape != scores.shape or truth.dtype != np.bool_:
            raise WTFlowError(
                f"pixel metrics need a map and a bool mask of one shape [H, W], not {scores.shape} and "
                f"{truth.shape} of {truth.dtype}. Resize the mask to the map and binarise it."
            )
        if self._resolution not in (None, scores.shape):
            raise WTFlowError(f"pixel metrics began at {self._resolution} and were given {scores.shape}: resize first.")
        self._resolution = scores.shape
        regions, count = ndimage.label(truth, structure=EIGHT_NEIGHBOURS)
        pixels_by_region = np.bincount(regions.ravel(), minlength=count + 1)
        self._regions += count
        self._normal.append(scores[~truth].astype(np.float32))
        self._anomalous.append(scores[truth].astype(np.float32))
        self._weights.append(1.0 / pixels_by_region[regions[truth]])

    def result(self) -> PixelResult:
        """The figures over everything added so far."""
        if not self._regions or not sum(part.size for part in self._normal):
            return PixelResult(None, None, None)
        normal = np.concatenate(self._normal)
        normal.sort()
        anomalous = np.concatenate(self._anomalous)
        fpr, pro = _curve(normal, anomalous, np.concatenate(self._weights) / self._regions)
        return PixelResult(
            pixel_auroc=auroc(normal, anomalous),
            aupro_30=_area(fpr, pro, 0.30) / 0.30,
            aupro_05=_area(fpr, pro, 0.05) / 0.05,
        )


class _Counts(NamedTuple):
    """For each distinct score t, from high to low: how many anomalous and how many normal scores are >= t."""

    thresholds: NDArray[np.float64]
    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]


def _counts_by_threshold(normal: ArrayLike, anomalous: ArrayLike) -> _Counts | None:
    """None without an anomalous score."""
    negatives, positives = np.sort(_checked(normal)), np.sort(_checked(anomalous))
    if not positives.size:
        return None
    thresholds = np.unique(np.concatenate([negatives, positives]))[::-1]
    return _Counts(
        thresholds=thresholds.astype(np.float64),
        true_positives=positives.size - np.searchsorted(positives, thresholds, side="left"),
        false_positives=negatives.size - np.searchsorted(negatives, thresholds, side="left"),
    )


def _curve(
    normal: NDArray[np.float32], anomalous: NDArray[np.float32], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corners (FPR, weight of the anomalous pixels called), from (0, 0) to (1, 1). `normal` is sorted.

    The curve rises at anomalous scores only. At such a score t it has two corners: scores > t, then
    scores >= t. From there it runs level to the next lower one.
    """
    thresholds, place = np.unique(anomalous, return_inverse=True)
    gain = np.bincount(place.ravel(), weights=weights)[::-1]
    reached = np.cumsum(gain)
    above = normal.size - np.searchsorted(normal, thresholds[::-1], side="right")
    at_least = normal.size - np.searchsorted(normal, thresholds[::-1], side="left")
    fpr = np.stack([above, at_least], axis=1).ravel() / normal.size
    level = np.stack([reached - gain, reached], axis=1).ravel()
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], level, [1.0]])


def _area(x: NDArray[np.float64], y: NDArray[np.float64], limit: float) -> float:
    """Area under the polyline (x rising) from 0 to `limit`, cut by linear interpolation."""
    inside = int(np.searchsorted(x, limit, side="right"))
    if inside < x.size:
        run = (limit - x[inside - 1]) / (x[inside] - x[inside - 1])
        end = y[inside - 1] + run * (y[inside] - y[inside - 1])
        x, y = np.append(x[:inside], limit), np.append(y[:inside], end)
    return float(np.trapezoid(y, x))


def _checked(scores: ArrayLike) -> Scores:
    """As a float array (float32 stays float32), or an error if a score is NaN."""
    values = np.asarray(scores)
    if values.dtype != np.float32:
        values = values.astype(np.float64)
    if np.isnan(values).any():
        raise WTFlowError("a score is NaN: no metric is defined. Look for NaN in the features or in the weights.")
    return values
