"""Do the scores of production still look like those that calibrated? Compared batch by batch, in order.

The two-sample test of Kolmogorov and Smirnov asks whether the scores of a batch and those of the calibration normals
come from one distribution; up to 10,000 images it is exact, if they are exchangeable. Defects are part of a
batch: a share d of them moves its distribution function by d at most, so a few per cent are seldom taken for a shift.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TextIO

import numpy as np
from scipy.stats import ks_2samp

from wtflow.errors import WTFlowError
from wtflow.scoring.bootstrap import Interval, clopper_pearson
from wtflow.scoring.calibration import Calibration

Shift = Literal["none", "higher", "lower"]


@dataclass(frozen=True)
class Batch:
    """Consecutive scores."""

    first: int
    """Place of the first one among all, from 1."""
    images: int
    flagged: int
    """Above the threshold."""
    flagged_interval: Interval
    """Of the share that is flagged in the long run, 95 %."""
    median_p: float
    """Median of the p-values: about 0.5 for normal parts as they were."""
    p_same: float
    """Of the test: small if the scores are distributed in another way than the calibration's."""
    shift: Shift
    """Whether they lie higher (parts look odder) or lower (more alike) where the two differ most; `none` if `p_same` is
    not below the level."""


def read_scores(replies: TextIO, bundle_digest: str) -> tuple[list[float], int]:
    """The scores of replies, a JSON object a line, and how many lines are left out: refusals, which have no score, and
    replies that name another bundle. Raises `WTFlowError` for a line that is no reply, and if no score is left."""
    scores, others = [], 0
    for number, text in enumerate(filter(str.strip, replies), start=1):
        try:
            reply = json.loads(text)
            if "error" in reply or "reason" in reply or reply.get("bundle_digest", bundle_digest) != bundle_digest:
                others += 1
                continue
            score = float(reply["score"])
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise WTFlowError(
                f"{replies.name}: reply {number} is not one of the service or of `wtflow score --json`, a JSON object "
                f"on a line of its own with the field score ({type(error).__name__}: {error}). Remove or mend it."
            ) from None
        if not math.isfinite(score):
            raise WTFlowError(f"{replies.name}: reply {number}: score is {score}. Remove it.")
        scores.append(score)
    if not scores:
        raise WTFlowError(
            f"{replies.name}: no score of bundle {bundle_digest[:12]} among {others} lines. Did this bundle score them?"
        )
    return scores, others


def batches(calibration: Calibration, scores: Sequence[float], size: int, level: float) -> list[Batch]:
    """Compare `scores`, in the order in which they came, `size` at a time; the last batch is whole, the first may not
    be. At most the share `level` of batches of unchanged normal parts is called shifted."""
    bounds = [0, *range(len(scores) % size or size, len(scores), size), len(scores)]
    return [_compared(calibration, scores[start:end], start, level) for start, end in pairwise(bounds) if start < end]


def least_replies(calibration: Calibration, level: float) -> int:
    """Size of the smallest batch that can be called shifted: p is least, 2 / C(n + m, n), if all n scores lie on one
    side of the m that calibrated, for so often n of n + m come first, or last, by chance."""
    images = len(calibration.scores)
    return bisect_left(range(int(2 / level) + 1), True, key=lambda size: math.comb(size + images, size) > 2 / level)


def _compared(calibration: Calibration, scores: Sequence[float], start: int, level: float) -> Batch:
    values = np.asarray(scores, dtype=np.float64)
    flagged = int((values > calibration.threshold).sum())
    interval = clopper_pearson(flagged, len(values))
    assert interval is not None  # no batch is empty
    test = ks_2samp(values, calibration.scores)
    shift: Shift = "none" if test.pvalue >= level else "lower" if test.statistic_sign > 0 else "higher"
    return Batch(
        first=start + 1,
        images=len(values),
        flagged=flagged,
        flagged_interval=interval,
        median_p=float(np.median(calibration.p_value(values))),
        p_same=float(test.pvalue),
        shift=shift,
    )
