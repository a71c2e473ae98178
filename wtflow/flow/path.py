"""The time-reversed path: data at t = 0, noise at t = 1 (docs/equations.md, E1 and E2)."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from wtflow.params import Section
from wtflow.shapes import FeatureMap, Times


class TimeParams(Section):
    """From which distribution the times of training are drawn."""

    kind: Literal["uniform", "logit-normal", "singular"]
    """`uniform` on [0, 1) is the paper's. `singular` crowds towards t = 0, where the score reads the field."""
    location: float
    """Of `logit-normal`: mean of log(t / (1 - t)); below 0 the times lean to the data."""
    scale: Annotated[float, Field(gt=0)]
    """Of `logit-normal`: standard deviation of log(t / (1 - t))."""
    power: Annotated[float, Field(gt=0)]
    """p of `singular`, t = u^p for uniform u: half of the times lie below 2^-p. 1 is `uniform`."""


@dataclass(frozen=True)
class PathSample:
    """A point of the path and the velocity there."""

    x_BCHW: FeatureMap
    velocity_BCHW: FeatureMap
    t_B: Times
    place_B: Tensor | None = None
    """Of samples that are single places, 1 x 1: which place of the map each is."""


def interpolate(x0_BCHW: FeatureMap, x1_BCHW: FeatureMap, t_B: Times, place_B: Tensor | None = None) -> PathSample:
    """Point (1 - t) x0 + t x1 and velocity x1 - x0 of the straight path.

    t in [0, 1], not clipped. The marginal field has Lipschitz constant 1/t: the singularity at the data end.
    """
    t_B111 = t_B.view(-1, 1, 1, 1)
    return PathSample(torch.lerp(x0_BCHW, x1_BCHW, t_B111), x1_BCHW - x0_BCHW, t_B, place_B)


def sample_times(count: int, params: TimeParams, generator: torch.Generator) -> Times:
    """`count` times in [0, 1] from the distribution that the settings ask for."""
    if params.kind == "logit-normal":
        return logit_normal_times(count, params.location, params.scale, generator)
    if params.kind == "singular":
        return singular_times(count, params.power, generator)
    return uniform_times(count, generator)


def uniform_times(count: int, generator: torch.Generator) -> Times:
    """`count` times from U[0, 1)."""
    return torch.rand(count, generator=generator)


def logit_normal_times(count: int, location: float, scale: float, generator: torch.Generator) -> Times:
    """1 / (1 + exp(-z)) for z ~ N(location, scale^2): the middle of the path, little of its ends."""
    return torch.sigmoid(location + scale * torch.randn(count, generator=generator))


def singular_times(count: int, power: float, generator: torch.Generator) -> Times:
    """u^p for u ~ U[0, 1): density t^(1/p - 1) / p, unbounded at the data end for p > 1."""
    return uniform_times(count, generator) ** power
