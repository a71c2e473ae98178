"""Nearest neighbours on the same features: what a memory of normal patches, with no learning, would reach."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from wtflow.data.shards import FeatureShards
from wtflow.features.fusion import Fusion

MEMORY = 8000


def scores(
    fusion: Fusion, fit: FeatureShards, train: Sequence[int], test: FeatureShards, rows: Sequence[int], seed: int
) -> NDArray[np.float64]:
    """Image score = the largest distance of a place's feature vector to its nearest of `MEMORY` random normal ones."""
    patches_NC = torch.cat([_patches(fusion(levels)) for levels in fit.batches(train, 32)])
    chosen = torch.randperm(len(patches_NC), generator=torch.Generator().manual_seed(seed))[:MEMORY]
    memory_MC = patches_NC[chosen]
    result = []
    for levels in test.batches(rows, 8):
        x_BCHW = fusion(levels)
        nearest_N = torch.cdist(_patches(x_BCHW), memory_MC).amin(dim=1)
        result.append(nearest_N.view(len(x_BCHW), -1).amax(dim=1).double().numpy())
    return np.concatenate(result)


def _patches(x_BCHW: torch.Tensor) -> torch.Tensor:
    return x_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
