"""Velocity fields v(x, t): networks that map a feature map and a time to a map of the same shape.

LocationNet at width b, the same network at each of the H x W places, which it knows by a learned vector:

    x  Linear C->b, + place | Block b->2b->b, `depth` times | Linear b->C

MiniUnet at width b, for C channels on H x W places (both divisible by 4):

    x  1x1 C->b | Res b->2b, 2b->2b | pool | Res 2b->4b, 4b->4b | pool | Res 4b->4b      (down and middle)
    nearest x2, cat, Res 8b->2b, 2b->2b | nearest x2, cat, Res 4b->b, b->b | 1x1 b->C    (up)
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Literal, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from torch import Tensor, nn

from wtflow.errors import WTFlowError
from wtflow.params import Section
from wtflow.shapes import FeatureMap, Times

VelocityField = Callable[[FeatureMap, Times], FeatureMap]


class VelocityParams(Section):
    """Which network and how large."""

    kind: Literal["location", "unet"]
    """`location` sees a place by itself: what is around it is in the coarser levels. `unet` is the paper's."""
    width: Annotated[int, Field(gt=0, multiple_of=2)]
    """b: channels of the first stage; must be even. The paper's network is a `unet` with b = 768."""
    depth: Annotated[int, Field(gt=0)]
    """Residual blocks of `location`, which alone reads it."""
    norm: Literal["batch", "group"]
    """Normalisation in the blocks of `unet`, which alone reads it. `batch` is the paper's; `group` sees each image by
    itself."""


def time_embedding(t_B: Times, width: int) -> Tensor:
    """sin and cos of 1000 t / 10000^(i / (width/2 - 1)): B x width."""
    rate_F = torch.exp(-math.log(10000.0) * torch.linspace(0, 1, width // 2, device=t_B.device))
    phase_BF = 1000.0 * t_B[:, None] * rate_F
    return torch.cat([phase_BF.sin(), phase_BF.cos()], dim=1)


class LocationBlock(nn.Module):
    """h + Linear(relu(Linear(rms norm(h) + time bias)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.time = nn.Linear(width, width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, h_BNC: Tensor, time_BT: Tensor) -> Tensor:
        wide_BNC = F.relu(self.widen(self.norm(h_BNC) + self.time(time_BT)[:, None]))
        added_BNC: Tensor = self.narrow(wide_BNC)
        return h_BNC + added_BNC


class LocationNet(nn.Module):
    """A residual network on each place's vector. See the module's docstring."""

    def __init__(self, params: VelocityParams, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.width = params.width
        self.enter = nn.Linear(channels, params.width)
        self.place = nn.Parameter(torch.zeros(size[0] * size[1], params.width))
        self.blocks = nn.ModuleList(LocationBlock(params.width) for _ in range(params.depth))
        self.leave = nn.Linear(params.width, channels)

    def forward(self, x_BCHW: FeatureMap, t_B: Times, place_B: Tensor | None = None) -> FeatureMap:
        """Velocity at the points x and times t, for maps of the size that the network was built for, or for the single
        places `place_B` of such maps, B x C x 1 x 1."""
        time_BT = time_embedding(t_B, self.width)
        place_BNC = self.place if place_B is None else self.place[place_B][:, None]
        h_BNC = self.enter(x_BCHW.flatten(2).transpose(1, 2)) + place_BNC
        for block in self.blocks:
            h_BNC = block(h_BNC, time_BT)
        velocity_BCHW: Tensor = self.leave(h_BNC).transpose(1, 2).reshape(x_BCHW.shape)
        return velocity_BCHW


class ResidualBlock(nn.Module):
    """r = x + time bias; relu(norm(conv r)) twice; plus a shortcut of r."""

    def __init__(self, inputs: int, outputs: int, time_width: int, norm: str) -> None:
        super().__init__()
        self.time = nn.Linear(time_width, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = _norm(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x_BCHW: FeatureMap, time_BT: Tensor) -> FeatureMap:
        r_BCHW = x_BCHW + self.time(time_BT)[:, :, None, None]
        h_BCHW = F.relu(self.norm1(self.conv1(r_BCHW)))
        h_BCHW = F.relu(self.norm2(self.conv2(h_BCHW)))
        shortcut_BCHW: Tensor = self.shortcut(r_BCHW)
        return h_BCHW + shortcut_BCHW


class MiniUnet(nn.Module):
    """The paper's U-Net with skips, at any width. See the module's docstring."""

    def __init__(self, params: VelocityParams, channels: int) -> None:
        super().__init__()
        b = self.width = params.width
        self.enter = nn.Conv2d(channels, b, 1)
        pairs = {"down1": (b, 2 * b, 2 * b), "down2": (2 * b, 4 * b, 4 * b), "middle": (4 * b, 4 * b)}
        pairs |= {"up2": (8 * b, 2 * b, 2 * b), "up1": (4 * b, b, b)}
        self.blocks = nn.ModuleDict(
            {
                name: nn.ModuleList(ResidualBlock(i, o, b, params.norm) for i, o in pairwise(sizes))
                for name, sizes in pairs.items()
            }
        )
        self.leave = nn.Conv2d(b, channels, 1)

    def forward(self, x_BCHW: FeatureMap, t_B: Times) -> FeatureMap:
        """Velocity at the points x and times t. H and W divisible by 4."""
        if x_BCHW.shape[-1] % 4 or x_BCHW.shape[-2] % 4:
            raise WTFlowError(
                f"train.velocity: a feature map of {x_BCHW.shape[-2]} x {x_BCHW.shape[-1]} places; both must be "
                "divisible by 4. Choose an image_size divisible by 4 x train.fusion.stride."
            )
        time_BT = time_embedding(t_B, self.width)
        fine = self._run("down1", self.enter(x_BCHW), time_BT)
        coarse = self._run("down2", F.max_pool2d(fine, 2), time_BT)
        h_BCHW = self._run("middle", F.max_pool2d(coarse, 2), time_BT)
        h_BCHW = self._run("up2", torch.cat([_twice(h_BCHW), coarse], dim=1), time_BT)
        h_BCHW = self._run("up1", torch.cat([_twice(h_BCHW), fine], dim=1), time_BT)
        velocity_BCHW: Tensor = self.leave(h_BCHW)
        return velocity_BCHW

    def _run(self, name: str, h_BCHW: Tensor, time_BT: Tensor) -> Tensor:
        stage = self.blocks[name]
        assert isinstance(stage, nn.ModuleList)
        for block in stage:
            h_BCHW = block(h_BCHW, time_BT)
        return h_BCHW


VelocityNet: TypeAlias = LocationNet | MiniUnet


def build_field(params: VelocityParams, channels: int, size: tuple[int, int]) -> VelocityNet:
    """The network that the settings ask for, for maps of `channels` x `size`."""
    if params.kind == "location":
        return LocationNet(params, channels, size)
    return MiniUnet(params, channels)


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(8, channels), channels)


def _twice(h_BCHW: Tensor) -> Tensor:
    return F.interpolate(h_BCHW, scale_factor=2, mode="nearest")
