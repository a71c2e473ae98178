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
    balance: Literal["none", "place"]
    """`place`: a place's energy in units of what the training images leave there, so that a seam that every part has
    does not drown a scratch beside it. `none`: the energy as it is."""
    top_fraction: Annotated[float, Field(gt=0, le=1)]
    """The image score is the mean over this share of the image's places, the highest ones; in (0, 1]."""


def energy(y_BCHW: FeatureMap) -> AnomalyMap:
    """-log of the density proxy, up to a constant: half the mean square over the channels. 0 in the well."""
    return 0.5 * y_BCHW.square().mean(dim=1)


SHRINKAGE = 20
"""Images' worth of the whole map's mean that a place's usual energy is drawn towards: it matters for small lines."""


def usual_energy(total_HW: Tensor, images: int) -> Tensor:
    """H x W: what normal images leave at each place, from the sum of their maps, drawn towards the mean of all."""
    mean = total_HW.mean() / images
    return (total_HW + SHRINKAGE * mean) / (images + SHRINKAGE)


def scored(energy_BHW: AnomalyMap, params: ScoreParams) -> AnomalyMap:
    """The map on the scale that `params` asks for."""
    return energy_BHW if params.kind == "energy" else -torch.expm1(-energy_BHW)


def top_mean(map_BYX: AnomalyMap, fraction: float) -> ImageScores:
    """Mean of the highest `fraction` of an image's places, at least one."""
    flat_BN = map_BYX.flatten(1)
    count = max(1, round(fraction * flat_BN.shape[1]))
    return flat_BN.topk(count, dim=1).values.mean(dim=1)
