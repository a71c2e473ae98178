"""From a transported sample to an energy for each place (docs/equations.md, E6)."""

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from wtflow.params import Section
from wtflow.shapes import AnomalyMap, FeatureMap, ImageScores

LEAST = 1e-3
"""Added to what is left along each axis, as a share of the mean over all."""


class ScoreParams(Section):
    """How a transported sample becomes an image's score."""

    kind: Literal["energy", "density"]
    """`energy`: 0.5 mean_c y^2, the negative log of the density proxy. `density`: 1 - exp(-energy), the proxy."""
    balance: Literal["none", "covariance"]
    """`covariance`: y in units of what the training images leave of it, along the axes along which they leave it, so
    that what is never emptied does not drown the rest. `none`: y as it is."""
    top_fraction: Annotated[float, Field(gt=0, le=1)]
    """Share of the image's places, the highest ones, that its score is made of; in (0, 1]."""
    pool: Literal["mean", "quantile"] = "mean"
    """`mean`: the score is their mean. `quantile`: the least of them, so that no smaller region raises it."""


def energy(y_BCHW: FeatureMap, unit_CC: Tensor) -> AnomalyMap:
    """-log of the density proxy, up to a constant: |unit y|^2, with the matrix of `units`. 0 in the well."""
    balanced_BCHW = torch.tensordot(unit_CC, y_BCHW, dims=([1], [1])).transpose(0, 1)
    energy_BHW: Tensor = balanced_BCHW.square().sum(dim=1)
    return energy_BHW


def units(usual_CC: Tensor) -> Tensor:
    """The matrix M with |M y|^2 = y' usual^-1 y / (2 C), C x C: half the mean of y^2 if `usual` is the identity."""
    lower_CC = torch.linalg.cholesky(usual_CC.double())
    identity_CC = torch.eye(len(usual_CC), dtype=torch.float64, device=usual_CC.device)
    inverse_CC: Tensor = torch.linalg.solve_triangular(lower_CC, identity_CC, upper=False)
    return (inverse_CC * math.sqrt(0.5 / len(usual_CC))).to(usual_CC.dtype)


def usual_products(batches: Iterable[tuple[FeatureMap, FeatureMap]]) -> Tensor:
    """Mean of y y' over the places of normal images, C x C float64, from batches of x0 and y; positive definite.

    A place counts by its |x0|^2: what matters is what is left of the rare among the good, which an anomaly has to be
    told from.
    """
    total_CC, weights = torch.zeros(()), torch.zeros(())
    for x0_BCHW, y_BCHW in batches:
        weight_M = x0_BCHW.square().mean(dim=1).flatten()
        y_MC = y_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
        total_CC = total_CC + ((weight_M[:, None] * y_MC).T @ y_MC).double()
        weights = weights + weight_M.sum().double()
    mean_CC = total_CC / weights
    least = LEAST * mean_CC.diagonal().mean()
    return mean_CC + least * torch.eye(len(mean_CC), dtype=torch.float64, device=mean_CC.device)


def scored(energy_BHW: AnomalyMap, params: ScoreParams) -> AnomalyMap:
    """The map on the scale that `params` asks for."""
    return energy_BHW if params.kind == "energy" else -torch.expm1(-energy_BHW)


def pooled(map_BYX: AnomalyMap, params: ScoreParams) -> ImageScores:
    """An image's score from the highest `top_fraction` of its places, at least one."""
    flat_BN = map_BYX.flatten(1)
    count = max(1, round(params.top_fraction * flat_BN.shape[1]))
    top_BK = flat_BN.topk(count, dim=1).values
    return top_BK.mean(dim=1) if params.pool == "mean" else top_BK[:, -1]
