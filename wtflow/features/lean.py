"""A frozen network in fewer operations: the same maps, to the rounding of float32, sooner.

norm(conv(x))             a batch norm in evaluation mode is affine, and goes into the convolution before it
conv(pad_same(x))         for a known image size the padding is the convolution's own; where it is one more on one
                          side than on the other, zeros enlarge the kernel
conv of 1 x 1             a product of matrices, in memory that has the channels last
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-4
"""How far a map may be from the network's, as a share of its highest value. Rounding is some 3e-6."""


@torch.no_grad()
def lean(network: nn.Module, image_size: tuple[int, int]) -> nn.Module:
    """What answers as `network` (in evaluation mode, left as it is) does for photographs of this height and width.

    A norm is taken to follow the convolution that is listed before it. Where that is not so, the maps of a probe
    differ, and the answer is a copy of the network as it is.
    """
    from timm.layers import BatchNormAct2d, Conv2dSame  # here, as in `build_backbone`

    probe_13YX = torch.randn(1, 3, *image_size, generator=torch.Generator().manual_seed(0))
    lighter = copy.deepcopy(network)
    inputs = _inputs(lighter, probe_13YX)
    for name, part in list(lighter.named_modules()):
        for (key, conv), (next_key, norm) in pairwise(list(part.named_children())):
            is_pair = isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            if is_pair and norm.num_features == conv.out_channels:
                part.add_module(key, fuse_conv_bn_eval(conv, norm))
                part.add_module(next_key, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
        for key, conv in list(part.named_children()):
            if isinstance(conv, Conv2dSame) and conv.dilation == (1, 1):
                part.add_module(key, _padding_itself(conv, inputs[f"{name}.{key}" if name else key]))
            elif type(conv) is nn.Conv2d and _is_pointwise(conv):
                part.add_module(key, _Pointwise(conv))
    lighter = lighter.to(memory_format=torch.channels_last).requires_grad_(False)
    return lighter if _alike(network(probe_13YX), lighter(probe_13YX)) else copy.deepcopy(network)


class _Pointwise(nn.Conv2d):
    """A convolution of 1 x 1 as a product of matrices. It keeps its weight, too, for a network that reads it."""

    weight_IO: Tensor
    bias_O: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None)
        self.weight, self.bias = conv.weight, conv.bias
        self.register_buffer("weight_IO", conv.weight[:, :, 0, 0].t().contiguous())
        self.register_buffer("bias_O", conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias)

    def forward(self, x_BIHW: Tensor) -> Tensor:
        y_BHWO = torch.matmul(x_BIHW.permute(0, 2, 3, 1), self.weight_IO)
        return y_BHWO.add_(self.bias_O).permute(0, 3, 1, 2)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def _padding_itself(conv: nn.Conv2d, sides: tuple[int, int]) -> nn.Conv2d:
    """A plain convolution that does for inputs of these sides what `conv` does with its padding to "same"."""
    kernel, padding, enlarged = [], [], []
    for side, size, stride in zip(sides, conv.kernel_size, conv.stride, strict=True):
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        padding.append(total - total // 2)
        enlarged.append(total % 2)
        kernel.append(size + total % 2)
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        (kernel[0], kernel[1]),
        (conv.stride[0], conv.stride[1]),
        (padding[0], padding[1]),
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    plain.weight.copy_(nn.functional.pad(conv.weight, (enlarged[1], 0, enlarged[0], 0)))
    if conv.bias is not None and plain.bias is not None:
        plain.bias.copy_(conv.bias)
    return plain


def _inputs(network: nn.Module, probe_13YX: Tensor) -> dict[str, tuple[int, int]]:
    """Height and width of what each convolution gets, by its name."""
    sides: dict[str, tuple[int, int]] = {}
    hooks = []
    for name, part in network.named_modules():
        if isinstance(part, nn.Conv2d):

            def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                sides[name] = (inputs[0].shape[2], inputs[0].shape[3])

            hooks.append(part.register_forward_pre_hook(note))
    network(probe_13YX)
    for hook in hooks:
        hook.remove()
    return sides


def _alike(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    return all(
        bool((one - other).abs().max() <= TOLERANCE * one.abs().max()) for one, other in zip(wanted, found, strict=True)
    )
