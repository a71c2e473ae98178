"""The head that scores where whitened features meet a field that sees a place by itself (docs/equations.md, E5 and E6).

    x0 = W z + o,    v = leave(blocks(enter((1 - t) x0) + place)),    y = x0 + s v,    e = |M y|^2

z are a place's fused channels; t, M and the weights are fixed. So x0 and the field's first layer are one product of z,
a level coarser than the map is multiplied before it is enlarged, norms' weights and time biases go into the matrix
behind them, and y comes in units in which e is its square. That is the same from any axes: y is turned (leave = Q R) so
that a field narrower than y reaches no more of its channels than it has itself, and what it does not reach is turned
again (= Q R) so that the finest level's D channels reach no more of it than D.
"""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from wtflow.features.fusion import Fusion
from wtflow.flow.velocity import LocationBlock, LocationNet, time_embedding
from wtflow.shapes import AnomalyMap


class PlaceHead(nn.Module):
    """{level: map} -> energy_BHW, with the weights that `fusion` (of norm `whiten`) and `field` have now."""

    mixer_KD: Tensor
    bias_K: Tensor
    place_Nb: Tensor
    leave_bA: Tensor
    """A: the axes of y that the field reaches, its first ones."""

    @torch.no_grad()
    def __init__(self, fusion: Fusion, field: LocationNet, step: float, t: float, unit_CC: Tensor) -> None:
        super().__init__()
        self.fusion = fusion
        enter_bC = (1 - t) * field.enter.weight
        first_b = field.enter.bias + enter_bC @ fusion.offset_C
        leave_Cb = step * unit_CC @ field.leave.weight
        turn_CC, leave_Ab = (factor.float() for factor in torch.linalg.qr(leave_Cb.double(), mode="complete"))
        leave_Ab = leave_Ab[: field.width]
        reached, turned_CC = len(leave_Ab), turn_CC.T @ unit_CC
        turned_CD, shift_C = turned_CC @ fusion.whitener_CD, turned_CC @ (fusion.offset_C + step * field.leave.bias)
        again_RR, rest_RD = (
            factor.float() for factor in torch.linalg.qr(turned_CD[reached:].double(), mode="complete")
        )
        first_bD = enter_bC @ fusion.whitener_CD
        self.register_buffer("mixer_KD", torch.cat([first_bD, turned_CD[:reached], rest_RD]))
        self.register_buffer("bias_K", torch.cat([first_b, shift_C[:reached], again_RR.T @ shift_C[reached:]]))
        self.register_buffer("place_Nb", field.place.clone())
        self.register_buffer("leave_bA", leave_Ab.T.contiguous())
        time_1T = time_embedding(field.place.new_full((1,), t), field.width)
        self.blocks = nn.ModuleList(_FixedBlock(cast(LocationBlock, block), time_1T) for block in field.blocks)

    def forward(self, levels: Mapping[int, Tensor]) -> AnomalyMap:
        """`wtflow.scoring.density.energy` of the features of any batch."""
        width, reached = self.leave_bA.shape
        mixed_BNK = self.fusion.mixed(levels, self.mixer_KD, self.bias_K, width + reached).flatten(1, 2)
        h_Mb = (mixed_BNK[:, :, :width] + self.place_Nb).flatten(0, 1)
        y_MC = mixed_BNK.flatten(0, 1)[:, width:]
        for block in self.blocks:
            block(h_Mb)
        y_MC[:, :reached].addmm_(h_Mb, self.leave_bA)
        energy_M: Tensor = torch.linalg.vecdot(y_MC, y_MC)
        return energy_M.view(-1, *self.fusion.size)


class _FixedBlock(nn.Module):
    """h <- h + narrow(relu(widen(h / rms))) for M places, in place: a `LocationBlock` at one time."""

    widen_bV: Tensor
    bias_V: Tensor
    narrow_Vb: Tensor
    bias_b: Tensor

    def __init__(self, block: LocationBlock, time_1T: Tensor) -> None:
        super().__init__()
        self.width, self.eps = block.norm.normalized_shape, block.norm.eps
        self.register_buffer("widen_bV", (block.widen.weight * block.norm.weight).T.contiguous())
        self.register_buffer("bias_V", block.widen(block.time(time_1T))[0])
        self.register_buffer("narrow_Vb", block.narrow.weight.T.contiguous())
        self.register_buffer("bias_b", block.narrow.bias.clone())

    def forward(self, h_Mb: Tensor) -> None:
        normed_Mb = F.rms_norm(h_Mb, self.width, eps=self.eps)
        wide_MV = torch.addmm(self.bias_V, normed_Mb, self.widen_bV).relu_()
        h_Mb.add_(self.bias_b).addmm_(wide_MV, self.narrow_Vb)
