"""How far chance in the choice of images may have moved a figure: the percentile bootstrap."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

Scores = NDArray[np.float64]
RESAMPLES = 2000


class Interval(NamedTuple):
    """From `low` to `high`."""

    low: float
    high: float


def clopper_pearson(hits: int, images: int) -> Interval | None:
    """95 % interval of the true share behind `hits` of `images`, taken as independent; None if there are none."""
    if not images:
        return None
    bounds = binomtest(hits, images).proportion_ci(0.95, method="exact")
    return Interval(float(bounds.low), float(bounds.high))


def bootstrap(
    figure: Callable[[Scores, Scores], float | None],
    normal: tuple[Scores, Sequence[str]],
    anomalous: tuple[Scores, Sequence[str]],
    seed: int = 0,
) -> Interval | None:
    """95 % percentile interval of `figure(normal scores, anomalous scores)`; None where the figure is.

    To each score its group: images that resemble each other are drawn together. Whole groups are drawn with
    replacement among those that hold the same labels, so that every resample has about as many images of both. Without
    groups, give each image one of its own. With few groups the interval is too narrow (it holds about 93 % instead of
    95 % with 40 and 30); at a figure that no resample can move (an AUROC of 1) it has no width.
    """
    scores, groups = np.concatenate([normal[0], anomalous[0]]), np.array([*normal[1], *anomalous[1]], dtype=str)
    if figure(normal[0], anomalous[0]) is None:
        return None
    is_anomalous = np.arange(scores.size) >= normal[0].size
    names, member = np.unique(groups, return_inverse=True)
    labels = np.bincount(member, ~is_anomalous).astype(bool) + 2 * np.bincount(member, is_anomalous).astype(bool)
    strata = [np.flatnonzero(labels == kind) for kind in np.unique(labels)]
    rng, figures = np.random.default_rng(seed), list[float]()
    for _ in range(RESAMPLES):
        drawn = np.concatenate([rng.choice(stratum, stratum.size) for stratum in strata])
        times = np.bincount(drawn, minlength=names.size)[member]
        value = figure(*(np.repeat(scores[kind], times[kind]) for kind in (~is_anomalous, is_anomalous)))
        if value is not None:
            figures.append(value)
    low, high = np.quantile(figures, [0.025, 0.975])
    return Interval(float(low), float(high))
