"""FastFlow (arXiv 2111.07677): anomalib's flow blocks, loss and maps on the shared backbone.

anomalib builds its model for four backbones only, so the parts are put together here; the forward pass is its own.
"""

from itertools import chain
from typing import Any

import torch
from anomalib.models.image.fastflow.anomaly_map import AnomalyMapGenerator
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.models.image.fastflow.torch_model import FastflowModel, create_fast_flow_block
from torch import nn

from benchmarks.contest.contender import Inputs
from benchmarks.peers.shared import Images, Peer


class LiteFastflow(FastflowModel):
    """`FastflowModel` with its parts sized for another backbone."""

    def __init__(self, images: Images, flow_steps: int, hidden_ratio: float, conv3x3_only: bool) -> None:
        nn.Module.__init__(self)
        self.input_size = images.backbone.params.image_size
        self.feature_extractor = images.network
        with torch.no_grad():
            shapes = [list(level.shape[1:]) for level in images.network(torch.zeros(1, 3, *self.input_size))]
        self.norms = nn.ModuleList(nn.LayerNorm(shape) for shape in shapes)
        self.fast_flow_blocks = nn.ModuleList(
            create_fast_flow_block(shape, conv3x3_only, hidden_ratio, flow_steps) for shape in shapes
        )
        self.anomaly_map_generator = AnomalyMapGenerator(input_size=self.input_size)


class FastFlow(Peer):
    """Settings: `epochs`, `batch_size`; optimiser as in anomalib's module."""

    def fit(self) -> None:
        levels = self.images.train_maps()
        norms, blocks = self.model.norms, self.model.fast_flow_blocks
        optimiser = torch.optim.Adam(chain(norms.parameters(), blocks.parameters()), lr=1e-3, weight_decay=1e-5)
        loss_of = FastflowLoss()
        self.model.train()
        for _ in range(self.settings["epochs"]):
            for chosen in torch.randperm(len(levels[0])).split(self.settings["batch_size"]):
                found = [block(norm(level[chosen])) for block, norm, level in zip(blocks, norms, levels, strict=True)]
                loss = loss_of([hidden for hidden, _ in found], [jacobian for _, jacobian in found])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
        self.model.eval()


def build(settings: dict[str, Any], seed: int, inputs: Inputs) -> FastFlow:
    """See `benchmarks.contest.contender`."""
    images = Images(inputs)
    model = LiteFastflow(images, flow_steps=8, hidden_ratio=1.0, conv3x3_only=False)
    return FastFlow(images, model, settings)
