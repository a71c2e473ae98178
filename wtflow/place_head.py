"""The head that scores where whitened features meet a field that sees a place by itself (docs/equations.md, E5 and E6).

    x0 = W z + o,    v = leave(blocks(enter((1 - t) x0) + place)),    y = x0 + s v,    e = 0.5 mean_c y_c^2 / u_c

z are a place's fused channels; t, u and the weights are fixed. So x0 and the field's first layer are one product of z,
a level coarser than the map is multiplied before it is enlarged, norms' weights and time biases go into the matrix
behind them, and y comes in units in which e is its square.
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
    bias_NK: Tensor
    leave_Cb: Tensor

    @torch.no_grad()
    def __init__(self, fusion: Fusion, field: LocationNet, step: float, t: float, usual_C: Tensor) -> None:
        super().__init__()
        self.fusion = fusion
        unit_C = (0.5 / (len(usual_C) * usual_C)).sqrt()
        enter_bC = (1 - t) * field.enter.weight
        first_Nb = field.place + field.enter.bias + enter_bC @ fusion.offset_C
        rest_NC = (unit_C * (fusion.offset_C + step * field.leave.bias)).expand(len(first_Nb), -1)
        whitener_CD = fusion.whitener_CD
        self.register_buffer("mixer_KD", torch.cat([unit_C[:, None] * whitener_CD, enter_bC @ whitener_CD]))
        self.register_buffer("bias_NK", torch.cat([rest_NC, first_Nb], dim=1))
        self.register_buffer("leave_Cb", step * unit_C[:, None] * field.leave.weight)
        time_1T = time_embedding(field.place.new_full((1,), t), field.width)
        self.blocks = nn.ModuleList(_FixedBlock(cast(LocationBlock, block), time_1T) for block in field.blocks)

    def forward(self, levels: Mapping[int, Tensor]) -> AnomalyMap:
        """`wtflow.scoring.density.energy` of the features of any batch."""
        mixed_BNK = self.fusion.mixed(levels, self.mixer_KD).flatten(1, 2).add_(self.bias_NK)
        channels = len(self.leave_Cb)
        x0_BNC, h_BNb = mixed_BNK[..., :channels], mixed_BNK[..., channels:]
        for block in self.blocks:
            h_BNb = block(h_BNb)
        y_BNC = F.linear(h_BNb, self.leave_Cb).add_(x0_BNC)
        energy_BN: Tensor = torch.linalg.vecdot(y_BNC, y_BNC)
        return energy_BN.view(-1, *self.fusion.size)


class _FixedBlock(nn.Module):
    """h + narrow(relu(widen(h / rms))): a `LocationBlock` at one time."""

    def __init__(self, block: LocationBlock, time_1T: Tensor) -> None:
        super().__init__()
        self.width, self.eps, self.narrow = block.norm.normalized_shape, block.norm.eps, block.narrow
        self.register_buffer("widen_Vb", block.widen.weight * block.norm.weight)
        self.register_buffer("bias_V", block.widen(block.time(time_1T))[0])

    def forward(self, h_BNb: Tensor) -> Tensor:
        normed_BNb = F.rms_norm(h_BNb, self.width, eps=self.eps)
        wide_BNV = F.linear(normed_BNb, self.get_buffer("widen_Vb"), self.get_buffer("bias_V")).relu_()
        added_BNb: Tensor = self.narrow(wide_BNV)
        return added_BNb.add_(h_BNb)
