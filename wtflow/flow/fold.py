"""A trained field at one time: what does not depend on x is worked out once (docs/equations.md, E5).

At a fixed t the time embedding is a constant, so each block's time bias is one too; batch norms in evaluation mode are
affine and go into the convolution before them. The result takes x alone and answers as the field does at t.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from wtflow.flow.velocity import LocationBlock, ResidualBlock, VelocityNet, time_embedding
from wtflow.shapes import FeatureMap, Times


@torch.no_grad()
def folded(field: VelocityNet, t: float) -> "FoldedField":
    """x_BCHW -> field(x_BCHW, t), with the weights that `field` has now."""
    fixed = copy.deepcopy(field).eval().requires_grad_(False)
    time_1T = time_embedding(next(fixed.parameters()).new_full((1,), t), field.width)
    for block in fixed.modules():
        if isinstance(block, LocationBlock | ResidualBlock):
            block.add_module("time", _Constant(block.time(time_1T)))
        if isinstance(block, ResidualBlock):
            for conv, norm in (("conv1", "norm1"), ("conv2", "norm2")):
                _fold_norm(block, conv, norm)
    return FoldedField(fixed, t)


class FoldedField(nn.Module):
    """A velocity that knows its time, whatever it is told."""

    def __init__(self, field: VelocityNet, t: float) -> None:
        super().__init__()
        self.field, self.t = field, t

    def forward(self, x_BCHW: FeatureMap, _: Times | None = None) -> FeatureMap:
        velocity_BCHW: Tensor = self.field(x_BCHW, x_BCHW.new_full((1,), self.t))
        return velocity_BCHW


def _fold_norm(block: ResidualBlock, conv: str, norm: str) -> None:
    """Put a batch norm into the convolution before it; a group norm depends on x and stays."""
    before, after = block.get_submodule(conv), block.get_submodule(norm)
    if isinstance(before, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
        block.add_module(conv, fuse_conv_bn_eval(before, after))
        block.add_module(norm, nn.Identity())


class _Constant(nn.Module):
    """The same answer whatever is asked."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, _: Tensor) -> Tensor:
        return self.get_buffer("value")
