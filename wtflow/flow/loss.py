"""The regression that trains the field (docs/equations.md, E4)."""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field

from wtflow.flow.path import PathSample
from wtflow.params import Section
from wtflow.shapes import FeatureMap, ImageScores, Times


class LossParams(Section):
    """How much a sample counts at its time."""

    weight: Literal["uniform", "near-data", "far-from-data"]
    """`uniform`: every time counts the same. The others are explained at `time_weight`."""
    scale: Annotated[float, Field(gt=0)]
    """tau of the weights that are not uniform: the time where they bend, in units of t. 0.1 is a tenth of the path."""


def matching_loss(field: Callable[..., FeatureMap], sample: PathSample) -> ImageScores:
    """Conditional flow matching: mean square over C, H, W of field(x_t, t) - velocity, one value a sample. A field that
    is asked at single places is told which."""
    places = () if sample.place_B is None else (sample.place_B,)
    error_BCHW = field(sample.x_BCHW, sample.t_B, *places) - sample.velocity_BCHW
    return error_BCHW.square().mean(dim=(1, 2, 3))


def time_weight(t_B: Times, params: LossParams) -> Times:
    """Weight of the loss at a time; its mean over t ~ U[0, 1) is 1, so that rates of learning stay comparable.

    Given x_t, a guess of the velocity is a guess of the data: x0 = x_t - t v. An error e in x0 is an error e / t in v,
    so that a uniform weight on v counts it as e^2 / t^2: without bound at the singularity.

    `far-from-data`, t^2 / (t^2 + tau^2), counts them as e^2 / (t^2 + tau^2) instead: no more than at tau. The field at
    t = 0 is then what it is at times about tau, carried on by the network's smoothness.
    `near-data`, tau^2 / (t^2 + tau^2), does the opposite: it spends the network on times below tau, because the score
    reads the field at t = 0 alone, and takes the noisier gradient.
    """
    tau = params.scale
    near_B = tau**2 / (t_B.square() + tau**2)
    mean = tau * math.atan(1 / tau)
    if params.weight == "near-data":
        return near_B / mean
    if params.weight == "far-from-data":
        return (1 - near_B) / (1 - mean)
    return torch.ones_like(t_B)
