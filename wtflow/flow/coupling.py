"""Couplings: which noise x1 a data point x0 is paired with (docs/equations.md, E3).

A coupling is a function of the data of the whole global batch and a generator, both on the CPU: what it draws depends
neither on the number of workers nor on the device. Its constant c = E<x0, x1> / E<x0, x0> says how far it lifts the
bottom of the well: v*(x0, 0) = -(1 - c) x0, so the one step that brings normal data to 0 has size 1 / (1 - c).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field

from wtflow.params import Section
from wtflow.shapes import FeatureMap


class CouplingParams(Section):
    """Which coupling."""

    kind: Literal["independent", "location-wt", "batch-wt", "sign-wt", "antipode", "sink", "batch-ot"]
    """`independent` is plain time-reversed flow matching; `wt` is worst transport, at each place of the map, over the
    images of a batch or for each number by itself; `antipode` and `sink` have no noise; `batch-ot` is the contrast."""
    candidates: Annotated[int, Field(gt=0)]
    """K of `location-wt`, which alone reads it: noise vectors that a place chooses from. 1 is `independent`."""


@dataclass(frozen=True)
class Coupling:
    """How noise is drawn for data, and the constant c of the pairing where it is the same for all data."""

    draw: Callable[[FeatureMap, torch.Generator], FeatureMap]
    c: float | None
    """None: depends on the data and has to be measured (`constant`)."""


def independent(x0_BCHW: FeatureMap, generator: torch.Generator) -> FeatureMap:
    """Standard Gaussian noise that knows nothing of the data: c = 0."""
    return torch.randn(x0_BCHW.shape, generator=generator, dtype=x0_BCHW.dtype)


def location_worst(x0_BCHW: FeatureMap, generator: torch.Generator, candidates: int) -> FeatureMap:
    """At each place, among K noise vectors the one whose inner product with x0 there is the most negative.

    With m_K the expected maximum of K standard normals, E[x1 | x0] = -m_K x0 / |x0| at each place; about
    c = -m_K / sqrt(C) for C channels, and m_K < sqrt(2 ln K). The noise is standard but for the direction of x0.
    """
    worst_BCHW = independent(x0_BCHW, generator)
    least_B1HW = (x0_BCHW * worst_BCHW).sum(dim=1, keepdim=True)
    for _ in range(candidates - 1):
        noise_BCHW = independent(x0_BCHW, generator)
        product_B1HW = (x0_BCHW * noise_BCHW).sum(dim=1, keepdim=True)
        worst_BCHW = torch.where(product_B1HW < least_B1HW, noise_BCHW, worst_BCHW)
        least_B1HW = torch.minimum(product_B1HW, least_B1HW)
    return worst_BCHW


def batch_worst(x0_BCHW: FeatureMap, generator: torch.Generator) -> FeatureMap:
    """Whole noise tensors dealt out to the images at the highest total cost, the sum of |x0 - x1|^2."""
    return _dealt(x0_BCHW, generator, highest_product=False)


def batch_optimal(x0_BCHW: FeatureMap, generator: torch.Generator) -> FeatureMap:
    """Whole noise tensors dealt out to the images at the lowest total cost: mini-batch optimal transport, c > 0."""
    return _dealt(x0_BCHW, generator, highest_product=True)


def sign_worst(x0_BCHW: FeatureMap, generator: torch.Generator) -> FeatureMap:
    """Every number of the noise given the sign opposite to x0's: -|z| sign(x0). c = -E|z| E|x0| / E[x0^2]."""
    return torch.copysign(independent(x0_BCHW, generator), -x0_BCHW)


def antipode(x0_BCHW: FeatureMap, generator: torch.Generator) -> FeatureMap:
    """-x0, where the worst map leads: no noise, c = -1."""
    return -x0_BCHW


def sink(x0_BCHW: FeatureMap, generator: torch.Generator) -> FeatureMap:
    """0, the centre itself: no noise; the target is -x0, so c = 0 and a step of 1 is exact."""
    return torch.zeros_like(x0_BCHW)


COUPLINGS = {
    "independent": Coupling(independent, c=0.0),
    "batch-wt": Coupling(batch_worst, c=None),
    "sign-wt": Coupling(sign_worst, c=None),
    "antipode": Coupling(antipode, c=-1.0),
    "sink": Coupling(sink, c=0.0),
    "batch-ot": Coupling(batch_optimal, c=None),
}
"""Those without settings of their own."""


def build_coupling(params: CouplingParams) -> Coupling:
    """The coupling that the settings ask for."""
    if params.kind == "location-wt":
        return Coupling(partial(location_worst, candidates=params.candidates), c=None)
    return COUPLINGS[params.kind]


def constant(coupling: Coupling, batches: Iterable[FeatureMap], generator: torch.Generator) -> float:
    """c of the coupling on this data: exact where it is known, else measured with one draw a batch, summed in float64.

    The batches should be as large as those of training: for `batch-wt` and `batch-ot` c depends on their size.
    """
    if coupling.c is not None:
        return coupling.c
    product = square = 0.0
    for x0_BCHW in batches:
        x1_BCHW = coupling.draw(x0_BCHW, generator)
        product += (x0_BCHW.double() * x1_BCHW).sum().item()
        square += x0_BCHW.double().square().sum().item()
    return product / square


def step_size(c: float) -> float:
    """Size of the one Euler step that empties the well."""
    return 1.0 / (1.0 - c)


def _dealt(x0_BCHW: FeatureMap, generator: torch.Generator, highest_product: bool) -> FeatureMap:
    """The norms are the same in every permutation: the highest cost is the lowest sum of inner products."""
    from scipy.optimize import linear_sum_assignment  # here: most couplings do without

    noise_BCHW = independent(x0_BCHW, generator)
    product_BB = x0_BCHW.flatten(1).double() @ noise_BCHW.flatten(1).double().T
    _, chosen_B = linear_sum_assignment(product_BB.numpy(), maximize=highest_product)
    return noise_BCHW[torch.from_numpy(chosen_B)]
