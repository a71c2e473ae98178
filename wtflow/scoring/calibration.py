"""What a score means, from normal photographs alone: split conformal prediction (docs/equations.md, E7).

If the n calibration scores and a new normal score s are exchangeable, then P(p(s) <= a) <= a for every a, and a line
that flags s above `threshold` flags at most the share `target_fpr` of normals, averaged over calibration sets.
A band below it may be set aside for a person to look at: above `review_threshold` lie at most `review_fpr` of normals.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from wtflow.errors import WTFlowError
from wtflow.params import Section


class CalibrationParams(Section):
    """What is asked of the threshold."""

    target_fpr: Annotated[float, Field(gt=0, lt=1)]
    """Share of normal images that may be flagged."""
    review_fpr: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of normal images that may be flagged or put to a person; above `target_fpr`. None: no review."""
    pixel_quantile: Annotated[float, Field(gt=0, lt=1)]
    """Share of places of normal images whose energy lies below the pixel threshold, the middle of the colour scale."""

    @model_validator(mode="after")
    def _review_is_wider(self) -> Self:
        if self.review_fpr is not None and self.review_fpr <= self.target_fpr:
            raise ValueError(f"review_fpr {self.review_fpr} must be above target_fpr {self.target_fpr}, or null")
        return self


@dataclass(frozen=True)
class Calibration:
    """Scores of the calibration normals, ascending, and what follows from them."""

    scores: NDArray[np.float64] = field(repr=False)
    target_fpr: float
    pixel_threshold: float
    review_fpr: float | None = None

    @property
    def threshold(self) -> float:
        """The ceil((n + 1)(1 - target_fpr))-th smallest calibration score; above it an image is anomalous."""
        return float(self.scores[conformal_rank(len(self.scores), self.target_fpr) - 1])

    @property
    def review_threshold(self) -> float | None:
        """The same for `review_fpr`; above it and not above `threshold` a person decides. None without such a band."""
        if self.review_fpr is None:
            return None
        return float(self.scores[conformal_rank(len(self.scores), self.review_fpr) - 1])

    def needs_review(self, score: float) -> bool:
        """Whether `score` lies in the band between the two thresholds."""
        return self.review_threshold is not None and bool(self.review_threshold < score <= self.threshold)

    def p_value(self, score: ArrayLike) -> NDArray[np.float64]:
        """(1 + number of calibration scores >= score) / (n + 1): in [1/(n+1), 1], small for anomalies."""
        at_least = len(self.scores) - np.searchsorted(self.scores, np.asarray(score), side="left")
        return np.asarray((1.0 + at_least) / (len(self.scores) + 1.0), dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats survive the round trip exactly. Without a band as before there were bands."""
        band = {"review_fpr": self.review_fpr, "review_threshold": self.review_threshold}
        return {
            "scores": self.scores.tolist(),
            "target_fpr": self.target_fpr,
            "pixel_threshold": self.pixel_threshold,
            "threshold": self.threshold,
            **(band if self.review_fpr is not None else {}),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Calibration":
        """Inverse of `to_json`."""
        scores = np.asarray(values["scores"], dtype=np.float64)
        return cls(scores, values["target_fpr"], values["pixel_threshold"], values.get("review_fpr"))


def conformal_rank(count: int, target_fpr: float) -> int:
    """Rank (from 1) of the threshold among `count` scores. Raises when `count` is too small for the rate."""
    # the tolerance keeps (n + 1)(1 - a) = 19.000000000000004 from becoming rank 20
    rank = math.ceil((count + 1) * (1 - target_fpr) - 1e-9)
    if rank > count:
        needed = math.ceil(1 / target_fpr - 1 - 1e-9)
        raise WTFlowError(
            f"train.calibration.target_fpr: {target_fpr} needs at least {needed} calibration images, not {count}. "
            "Add normal images, raise prepare.calibrate_fraction, or raise target_fpr."
        )
    return rank


def calibrate(
    scores: NDArray[np.float64], place_energies: NDArray[np.float32], params: CalibrationParams
) -> Calibration:
    """Calibration from the scores and the maps' values of the `calibrate` normals.

    Raises `WTFlowError` for a rate that so few scores cannot hold, and for scores that are not finite.
    """
    if not np.isfinite(scores).all():
        raise WTFlowError("calibration: a score is not finite: training diverged. Lower train.learning_rate.")
    conformal_rank(len(scores), params.target_fpr)
    pixel_threshold = float(np.quantile(place_energies, params.pixel_quantile))
    return Calibration(np.sort(scores.astype(np.float64)), params.target_fpr, pixel_threshold, params.review_fpr)
