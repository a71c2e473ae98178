"""The time-reversed path: data at t = 0, noise at t = 1 (docs/equations.md, E1 and E2)."""

from dataclasses import dataclass

import torch

from wtflow.shapes import FeatureMap, Times


@dataclass(frozen=True)
class PathSample:
    """A point of the path and the velocity there."""

    x_BCHW: FeatureMap
    velocity_BCHW: FeatureMap
    t_B: Times


def interpolate(x0_BCHW: FeatureMap, x1_BCHW: FeatureMap, t_B: Times) -> PathSample:
    """Point (1 - t) x0 + t x1 and velocity x1 - x0 of the straight path.

    t in [0, 1], not clipped. The marginal field has Lipschitz constant 1/t: the singularity at the data end.
    """
    t_B111 = t_B.view(-1, 1, 1, 1)
    return PathSample(torch.lerp(x0_BCHW, x1_BCHW, t_B111), x1_BCHW - x0_BCHW, t_B)


def uniform_times(count: int, generator: torch.Generator) -> Times:
    """`count` times from U[0, 1)."""
    return torch.rand(count, generator=generator)
