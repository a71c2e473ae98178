"""Backbone levels -> x0, the tensor that the flow transports.

{level: B x C_l x H_l x W_l} --3x3 mean, to one size--> --concatenate--> B x D x H x W --normalise--> x0_BCHW

Inside, a place's channels lie side by side (B x H x W x D), which is what products with matrices want.
"""

import math
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from torch import Tensor, nn

from wtflow.errors import WTFlowError
from wtflow.params import Section
from wtflow.shapes import FeatureMap

RIDGE = 0.01
"""Added to the eigenvalues of the channels' correlation matrix, whose mean is 1: no direction is enlarged more than
tenfold."""


class FusionParams(Section):
    """Which levels, at which resolution, on which scale."""

    levels: tuple[int, ...]
    """Backbone levels used, a subset of the extracted ones."""
    stride: Annotated[int, Field(gt=0)]
    """Pixels of the resized image to a place of the map; finer levels are averaged down, coarser ones enlarged."""
    smooth: bool
    """Average over 3 x 3 places first, as PatchCore and the paper's AvgPool2d(3) do."""
    norm: Literal["layer", "channel", "whiten"]
    """`layer`: each image to mean 0, variance 1 over C, H, W (the paper; puts x0 on the shell ||x0|| = sqrt(d)).
    `channel`: each channel to mean 0, variance 1 over the training split, which keeps what differs between images.
    `whiten`: each level of each image as in `layer`, then the principal components of the training split's channels to
    mean 0, variance 1: x0 is as near to the noise that the path ends at as a linear map can bring it."""
    components: Annotated[int, Field(gt=0)]
    """C of `whiten`, which alone reads it: principal components kept, all if there are fewer."""


class Fusion(nn.Module):
    """Fuses D channels and normalises them to C. The statistics are buffers, learnt once from the training features."""

    mean_D11: Tensor
    std_D11: Tensor
    whitener_CD: Tensor
    offset_C: Tensor

    def __init__(self, params: FusionParams, inputs: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.params, self.inputs, self.size = params, inputs, size
        self.channels = min(params.components, inputs) if params.norm == "whiten" else inputs
        if params.norm == "channel":
            self.register_buffer("mean_D11", torch.zeros(self.inputs, 1, 1))
            self.register_buffer("std_D11", torch.ones(self.inputs, 1, 1))
        if params.norm == "whiten":
            self.register_buffer("whitener_CD", torch.eye(self.channels, self.inputs))
            self.register_buffer("offset_C", torch.zeros(self.channels))

    def fuse(self, levels: Mapping[int, Tensor]) -> FeatureMap:
        """Levels brought to one size and concatenated: B x D x H x W, not yet normalised over the training split."""
        maps = [self._to_size(self._read(levels[level])) for level in self.params.levels]
        return torch.cat(maps, dim=3).permute(0, 3, 1, 2)

    def mixed(self, levels: Mapping[int, Tensor], mixer_KD: Tensor, bias_K: Tensor, full: int | None = None) -> Tensor:
        """The fused channels times a matrix, plus a bias: B x H x W x K. Below its first `full` rows the matrix is
        upper triangular; None: nowhere.

        A coarse level is multiplied before it is enlarged, which leaves the bias as it is."""
        maps = [self._read(levels[level]) for level in self.params.levels]
        coarse: list[tuple[Tensor, Tensor]] = []
        fine: list[tuple[Tensor, Tensor]] = []
        end = 0
        for map_BYXD in maps:
            start, end = end, end + map_BYXD.shape[3]
            if map_BYXD.shape[1:3].numel() < math.prod(self.size):
                coarse.append((map_BYXD, mixer_KD[:, start:end]))
            else:
                fine.append((map_BYXD, mixer_KD[: None if full is None else full + end, start:end]))
        enlarged = [
            self._to_size(F.linear(map_BYXD, piece_KD, None if number else bias_K))
            for number, (map_BYXD, piece_KD) in enumerate(coarse)
        ]
        total_BHWK = reduce(Tensor.add_, enlarged) if coarse else bias_K.repeat(len(maps[0]), *self.size, 1)
        for map_BYXD, piece_AD in fine:  # added up by the product itself, on the rows that are not 0
            total_BHWK.view(-1, len(mixer_KD))[:, : len(piece_AD)].addmm_(
                self._to_size(map_BYXD).flatten(0, 2), piece_AD.T
            )
        return total_BHWK

    def forward(self, levels: Mapping[int, Tensor]) -> FeatureMap:
        """x0: fused and normalised features."""
        if self.params.norm == "whiten":
            return self.mixed(levels, self.whitener_CD, self.offset_C).permute(0, 3, 1, 2)
        x_BDHW = self.fuse(levels)
        if self.params.norm == "layer":
            return F.layer_norm(x_BDHW, x_BDHW.shape[1:], eps=1e-5)
        return (x_BDHW - self.mean_D11) / self.std_D11

    def _read(self, map_BDYX: Tensor) -> Tensor:
        """A level's map as B x Y x X x D: for `whiten` each image's to mean 0, variance 1; then the mean over 3 x 3."""
        map_BYXD = map_BDYX.permute(0, 2, 3, 1).to(torch.float32, memory_format=torch.contiguous_format)
        if self.params.norm == "whiten":
            map_BYXD = F.layer_norm(map_BYXD, map_BYXD.shape[1:], eps=1e-5)
        if self.params.smooth:
            map_BDYX = F.avg_pool2d(map_BYXD.permute(0, 3, 1, 2), 3, stride=1, padding=1, count_include_pad=False)
            map_BYXD = map_BDYX.permute(0, 2, 3, 1).contiguous()
        return map_BYXD

    def _to_size(self, map_BYXD: Tensor) -> Tensor:
        """B x H x W x D: the mean of places that fall together, or the line between neighbours (edges aligned)."""
        map_BDYX = map_BYXD.permute(0, 3, 1, 2)
        if map_BYXD.shape[1:3].numel() < math.prod(self.size):
            map_BDYX = F.interpolate(map_BDYX, self.size, mode="bilinear", align_corners=False)
        elif map_BYXD.shape[1:3] != self.size:
            map_BDYX = F.adaptive_avg_pool2d(map_BDYX, self.size)
        return map_BDYX.permute(0, 2, 3, 1).contiguous()

    @torch.no_grad()
    def learn_statistics(self, batches: Iterable[Mapping[int, Tensor]]) -> None:
        """Mean and standard deviation of the channels, or their principal components, over all places of all training
        images, summed in float64."""
        if self.params.norm == "layer":
            return
        count, total_D = 0, torch.zeros(self.inputs, dtype=torch.float64)
        product_DD = torch.zeros(self.inputs, self.inputs, dtype=torch.float64)
        for levels in batches:
            x_DN = self.fuse(levels).transpose(0, 1).flatten(1).double()
            total_D += x_DN.sum(1)
            product_DD += x_DN @ x_DN.T
            count += x_DN.shape[1]
        mean_D = total_D / count
        covariance_DD = product_DD / count - torch.outer(mean_D, mean_D)
        std_D = covariance_DD.diagonal().clamp_min(0).sqrt().clamp_min(1e-6)
        if self.params.norm == "channel":
            self.mean_D11.copy_(mean_D.view(-1, 1, 1))
            self.std_D11.copy_(std_D.view(-1, 1, 1))
            return
        values_D, vectors_DD = torch.linalg.eigh(covariance_DD / torch.outer(std_D, std_D))
        scale_D = (values_D.clamp_min(0) + RIDGE).rsqrt()
        whitener_CD = (vectors_DD * scale_D)[:, -self.channels :].T / std_D
        self.whitener_CD.copy_(whitener_CD)
        self.offset_C.copy_(-whitener_CD @ mean_D)


def build_fusion(params: FusionParams, levels: Mapping[int, Tensor], image_size: tuple[int, int]) -> Fusion:
    """A fusion for features shaped like `levels` (any batch), of images of `image_size` pixels."""
    missing = set(params.levels) - set(levels)
    if missing:
        raise WTFlowError(
            f"train.fusion.levels: {sorted(missing)} were not extracted, only {sorted(levels)}. "
            "Choose among them, or add the level to extract.backbone.levels and extract again."
        )
    if params.stride > min(image_size):
        raise WTFlowError(
            f"train.fusion.stride: {params.stride} leaves no place of an image of {image_size[0]} x {image_size[1]} "
            f"pixels. Choose at most {min(image_size)}."
        )
    size = (image_size[0] // params.stride, image_size[1] // params.stride)
    return Fusion(params, sum(levels[level].shape[1] for level in params.levels), size)
