"""Nearest neighbours on the same features: what a memory of normal patches, with no learning, would reach."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from wtflow.data.shards import FeatureShards
from wtflow.features.fusion import Fusion

MEMORY = 8000


def memorise(fusion: Fusion, fit: FeatureShards, train: Sequence[int], seed: int) -> torch.Tensor:
    """`MEMORY` random places' feature vectors of the training images, M x C."""
    patches_NC = torch.cat([_patches(fusion(levels)) for levels in fit.batches(train, 32)])
    chosen = torch.randperm(len(patches_NC), generator=torch.Generator().manual_seed(seed))[:MEMORY]
    return patches_NC[chosen]


def distances(fusion: Fusion, memory_MC: torch.Tensor, levels: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Distance of each place to its nearest in memory, B x H x W."""
    x_BCHW = fusion(levels)
    nearest_N = torch.cdist(_patches(x_BCHW), memory_MC).amin(dim=1)
    return nearest_N.view(len(x_BCHW), *x_BCHW.shape[2:])


def scores(
    fusion: Fusion, fit: FeatureShards, train: Sequence[int], test: FeatureShards, rows: Sequence[int], seed: int
) -> NDArray[np.float64]:
    """Image score = the largest distance of a place."""
    memory_MC = memorise(fusion, fit, train, seed)
    maps = [distances(fusion, memory_MC, levels) for levels in test.batches(rows, 8)]
    return torch.cat([map_BHW.flatten(1).amax(dim=1) for map_BHW in maps]).double().numpy()


def _patches(x_BCHW: torch.Tensor) -> torch.Tensor:
    return x_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
