"""From a transported sample to an energy for each place (docs/equations.md, E6)."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from wtflow.params import Section
from wtflow.shapes import AnomalyMap, FeatureMap, ImageScores


class ScoreParams(Section):
    """How a transported sample becomes an image's score."""

    kind: Literal["energy", "density"]
    """`energy`: 0.5 mean_c y^2, the negative log of the density proxy. `density`: 1 - exp(-energy), the proxy."""
    balance: Literal["none", "channel"]
    """`channel`: each channel of y in units of what the training images leave there, so that one that is never emptied
    does not drown the others. `none`: y as it is."""
    top_fraction: Annotated[float, Field(gt=0, le=1)]
    """Share of the image's places, the highest ones, that its score is made of; in (0, 1]."""
    pool: Literal["mean", "quantile"] = "mean"
    """`mean`: the score is their mean. `quantile`: the least of them, so that no smaller region raises it."""


def energy(y_BCHW: FeatureMap, usual_C: Tensor) -> AnomalyMap:
    """-log of the density proxy, up to a constant: half the mean over the channels of y^2 / usual. 0 in the well."""
    energy_BHW: Tensor = torch.tensordot(y_BCHW.square(), 0.5 / (len(usual_C) * usual_C), dims=([1], [0]))
    return energy_BHW


def usual_square(total_C: Tensor, places: int) -> Tensor:
    """C: mean of y^2 over so many places of normal images, at least a thousandth of the mean of all channels."""
    usual_C = total_C / places
    return usual_C.clamp_min(1e-3 * float(usual_C.mean()))


def scored(energy_BHW: AnomalyMap, params: ScoreParams) -> AnomalyMap:
    """The map on the scale that `params` asks for."""
    return energy_BHW if params.kind == "energy" else -torch.expm1(-energy_BHW)


def pooled(map_BYX: AnomalyMap, params: ScoreParams) -> ImageScores:
    """An image's score from the highest `top_fraction` of its places, at least one."""
    flat_BN = map_BYX.flatten(1)
    count = max(1, round(params.top_fraction * flat_BN.shape[1]))
    top_BK = flat_BN.topk(count, dim=1).values
    return top_BK.mean(dim=1) if params.pool == "mean" else top_BK[:, -1]
