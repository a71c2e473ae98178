"""Couplings: which noise x1 a data point x0 is paired with (docs/equations.md, E3).

A coupling is a function of the data and a generator. Its constant c = E<x0, x1> / d says how far it lifts the bottom
of the well: v*(x0, 0) = -(1 - c) x0, so the one step that brings normal data to 0 has size 1 / (1 - c).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from wtflow.params import Section
from wtflow.shapes import FeatureMap


@dataclass(frozen=True)
class Coupling:
    """How noise is drawn for data, and the constant c of the pairing."""

    draw: Callable[[FeatureMap, torch.Generator], FeatureMap]
    c: float

    @property
    def step(self) -> float:
        """Size of the Euler step that empties the well."""
        return 1.0 / (1.0 - self.c)


def independent_noise(x0_BCHW: FeatureMap, generator: torch.Generator) -> FeatureMap:
    """Standard Gaussian noise that knows nothing of the data: plain time-reversed flow matching, c = 0."""
    return torch.randn(x0_BCHW.shape, generator=generator)


COUPLINGS = {"independent": Coupling(independent_noise, c=0.0)}


class CouplingParams(Section):
    """Which coupling."""

    kind: Literal["independent"]
