"""How well scores part anomalous from normal, images and pixels. Ties are merged.

A figure that the data do not define (no anomalous image, no mask) is None, never NaN. Scores are raw energy,
larger for more anomalous; nothing clamps or normalises them before. A NaN among them is a `WTFlowError`.

Images: `normal` [N] and `anomalous` [M] scores -> `auroc`, `average_precision`, `f1_max`. Exact.
Pixels: `PixelMetrics.add` one (map [H, W], mask [H, W]) an image, then `PixelMetrics.result`. From a histogram.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from wtflow.errors import WTFlowError
from wtflow.scoring.histogram import Histogram

Scores = NDArray[np.float32] | NDArray[np.float64]
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
NORMAL, ANOMALOUS, COVERED = range(3)
"""Rows of the pixels' histogram: counts of both kinds, and the share of a region that each pixel is worth."""


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
    pixel_ap: float | None
    aupro_30: float | None
    aupro_05: float | None


class SaturatedRegion(NamedTuple):
    """An anomaly of an image, of which only a part need be found."""

    mask: NDArray[np.bool_]
    """[H, W]"""
    saturation: float
    """Pixels that cover it fully: see `saturation_area`."""


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
    """Pixel figures of a line, from its test images one by one. All maps have one resolution.

    PRO(t) is the share of a region's pixels with score >= t, averaged over all regions of the line: each
    counts alike, whatever its size and image. FPR(t) is over all normal pixels, those of good images included.
    AUPRO(limit) is the area under PRO over FPR from 0 to `limit`, divided by `limit`; the curve starts at (0, 0) and
    is linear between distinct thresholds.

    Memory does not grow with the number of pixels, and accumulators add: `sum(parts, PixelMetrics())` over parts
    from several workers, in any order, has the figures of one pass. Scores of one bin of `wtflow.scoring.histogram`
    count as ties.
    """

    def __init__(self) -> None:
        self._resolution: tuple[int, ...] | None = None
        self._regions = 0
        self._histogram = Histogram(rows=3)

    def add(self, anomaly_map: ArrayLike, mask: ArrayLike) -> None:
        """Take one image: map [H, W] of raw scores; mask [H, W] of bool, True where anomalous.

        A region is an 8-connected component of the mask.
        """
        scores, truth = self._one_image(anomaly_map, mask)
        regions, count = ndimage.label(truth, structure=EIGHT_NEIGHBOURS)
        inside = regions[truth]
        self._regions += count
        self._histogram.add(NORMAL, scores[~truth])
        self._histogram.add(ANOMALOUS, scores[truth])
        self._histogram.add(COVERED, scores[truth], 1.0 / np.bincount(inside, minlength=count + 1)[inside])

    def add_regions(self, anomaly_map: ArrayLike, regions: Sequence[SaturatedRegion]) -> None:
        """Take one image whose regions are given, connected or not; they may overlap.

        With them PRO is sPRO: a region counts as found by min(its pixels found / its saturation, 1).
        """
        masks = [np.zeros(np.shape(anomaly_map), dtype=bool), *(region.mask for region in regions)]
        checked = [self._one_image(anomaly_map, mask) for mask in masks]
        descending = [np.sort(scores[mask])[::-1] for scores, mask in checked[1:]]
        gains = [_gains(found.size, region.saturation) for found, region in zip(descending, regions, strict=True)]
        scores, truth = checked[0][0], np.any(masks, axis=0)
        self._regions += len(regions)
        self._histogram.add(NORMAL, scores[~truth])
        self._histogram.add(ANOMALOUS, scores[truth])
        for found, gain in zip(descending, gains, strict=True):
            self._histogram.add(COVERED, found, gain)

    def __add__(self, other: "PixelMetrics") -> "PixelMetrics":
        """What one accumulator would hold that had taken the images of both."""
        total = PixelMetrics()
        for part in (self, other):
            total._resolution = total._one_resolution(part._resolution)
            total._regions += part._regions
            total._histogram.take(part._histogram)
        return total

    def result(self) -> PixelResult:
        """The figures over everything added so far."""
        normal, anomalous, covered = np.cumsum(self._histogram.weights[:, ::-1], axis=1)
        if not self._regions or not normal[-1]:
            return PixelResult(None, None, None, None)
        occupied = np.diff(normal + anomalous, prepend=0.0) > 0
        normal, anomalous, covered = (np.append(0.0, row[occupied]) for row in (normal, anomalous, covered))
        fpr, tpr, pro = normal / normal[-1], anomalous / anomalous[-1], covered / self._regions
        precision = anomalous[1:] / (anomalous + normal)[1:]
        return PixelResult(
            pixel_auroc=float(np.trapezoid(tpr, fpr)),
            pixel_ap=float(np.sum(np.diff(tpr) * precision)),
            aupro_30=_area(fpr, pro, 0.30) / 0.30,
            aupro_05=_area(fpr, pro, 0.05) / 0.05,
        )

    def _one_image(self, anomaly_map: ArrayLike, mask: ArrayLike) -> tuple[Scores, NDArray[np.bool_]]:
        """Map and mask, checked."""
        scores, truth = _checked(anomaly_map), np.asarray(mask)
        if scores.ndim != 2 or truth.shape != scores.shape or truth.dtype != np.bool_:
            raise WTFlowError(
                f"pixel metrics need a map and a bool mask of one shape [H, W], not {scores.shape} and "
                f"{truth.shape} of {truth.dtype}. Resize the mask to the map and binarise it."
            )
        self._resolution = self._one_resolution(scores.shape)
        return scores, truth

    def _one_resolution(self, other: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """The resolution of both, or an error."""
        if self._resolution and other and self._resolution != other:
            raise WTFlowError(f"pixel metrics began at {self._resolution} and were given {other}: resize first.")
        return self._resolution or other


def saturation_area(pixels: int, threshold: float, relative: bool) -> float:
    """Pixels of a region after which it is fully covered: a share of it (whole pixels, at least one), or a number and
    at most all of it.

    The two kinds of `saturation_threshold` in the defects_config.json of MVTec LOCO AD.
    """
    return max(1, int(threshold * pixels)) if relative else min(threshold, pixels)


def _gains(pixels: int, saturation: float) -> NDArray[np.float64]:
    """What each pixel of a region adds to its share found, the highest score first; nothing after saturation."""
    if not 0 < saturation <= pixels:
        raise WTFlowError(
            f"a region of {pixels} pixels cannot saturate at {saturation}: give more than 0 and at most its area, "
            "as saturation_area() does."
        )
    gains: NDArray[np.float64] = np.clip(saturation - np.arange(pixels), 0.0, 1.0) / saturation
    return gains


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
