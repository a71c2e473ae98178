"""Backbone levels -> x0, the tensor that the flow transports.

{level: B x C_l x H_l x W_l} --3x3 mean--> --to one size--> --concatenate--> B x C x H x W --normalise--> x0_BCHW
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from torch import Tensor, nn

from wtflow.errors import WTFlowError
from wtflow.params import Section
from wtflow.shapes import FeatureMap


class FusionParams(Section):
    """Which levels, at which resolution, on which scale."""

    levels: tuple[int, ...]
    """Backbone levels used, a subset of the extracted ones."""
    stride: Annotated[int, Field(gt=0)]
    """Pixels of the resized image to a place of the map; finer levels are averaged down, coarser ones enlarged."""
    smooth: bool
    """Average over 3 x 3 places first, as PatchCore and the paper's AvgPool2d(3) do."""
    norm: Literal["layer", "channel"]
    """`layer`: each image to mean 0, variance 1 over C, H, W (the paper; puts x0 on the shell ||x0|| = sqrt(d)).
    `channel`: each channel to mean 0, variance 1 over the training split, which keeps what differs between images."""


class Fusion(nn.Module):
    """Fuses and normalises. The channel statistics are buffers, learnt once from the training features."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, params: FusionParams, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.params, self.channels, self.size = params, channels, size
        self.register_buffer("mean_C11", torch.zeros(channels, 1, 1))
        self.register_buffer("std_C11", torch.ones(channels, 1, 1))

    def fuse(self, levels: Mapping[int, Tensor]) -> FeatureMap:
        """Levels brought to one size and concatenated, not yet normalised."""
        maps = []
        for level in self.params.levels:
            map_BCHW = levels[level].float()
            if self.params.smooth:
                map_BCHW = F.avg_pool2d(map_BCHW, 3, stride=1, padding=1, count_include_pad=False)
            if map_BCHW.shape[-2] > self.size[0] or map_BCHW.shape[-1] > self.size[1]:
                map_BCHW = F.adaptive_avg_pool2d(map_BCHW, self.size)
            elif map_BCHW.shape[-2:] != self.size:
                map_BCHW = F.interpolate(map_BCHW, self.size, mode="bilinear", align_corners=False)
            maps.append(map_BCHW)
        return torch.cat(maps, dim=1)

    def forward(self, levels: Mapping[int, Tensor]) -> FeatureMap:
        """x0: fused and normalised features."""
        x_BCHW = self.fuse(levels)
        if self.params.norm == "layer":
            return F.layer_norm(x_BCHW, x_BCHW.shape[1:], eps=1e-5)
        return (x_BCHW - self.mean_C11) / self.std_C11

    @torch.no_grad()
    def learn_statistics(self, batches: Iterable[Mapping[int, Tensor]]) -> None:
        """Channel mean and standard deviation over all places of all training images, summed in float64."""
        total, square, count = torch.zeros(self.channels).double(), torch.zeros(self.channels).double(), 0
        for levels in batches:
            x_CN = self.fuse(levels).transpose(0, 1).flatten(1).double()
            total += x_CN.sum(1)
            square += x_CN.square().sum(1)
            count += x_CN.shape[1]
        mean_C = total / count
        std_C = (square / count - mean_C.square()).clamp_min(0).sqrt()
        self.mean_C11.copy_(mean_C.view(-1, 1, 1))
        self.std_C11.copy_(std_C.clamp_min(1e-6).view(-1, 1, 1))


def build_fusion(params: FusionParams, levels: Mapping[int, Tensor], image_size: tuple[int, int]) -> Fusion:
    """A fusion for features shaped like `levels` (any batch), of images of `image_size` pixels."""
    missing = set(params.levels) - set(levels)
    if missing:
        raise WTFlowError(
            f"train.fusion.levels: {sorted(missing)} were not extracted, only {sorted(levels)}. "
            "Choose among them, or add the level to extract.backbone.levels and extract again."
        )
    size = (image_size[0] // params.stride, image_size[1] // params.stride)
    return Fusion(params, sum(levels[level].shape[1] for level in params.levels), size)
