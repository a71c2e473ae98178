"""Reverse distillation (arXiv 2201.10703): anomalib's bottleneck, decoder, loss and maps behind the shared backbone.

anomalib builds decoders for ResNets only, and its bottleneck takes three levels. So the encoder gives levels 1 to 3, a
1 x 1 convolution brings each to the width that the ResNet-18 parts expect, and another brings the decoder's maps back.
"""

from itertools import chain
from typing import Any

import torch
from anomalib.models.components.backbone import get_decoder
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode, AnomalyMapGenerator
from anomalib.models.image.reverse_distillation.components import get_bottleneck_layer
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel
from torch import Tensor, nn

from benchmarks.contest.contender import Inputs
from benchmarks.peers.shared import Images, Peer

LEVELS = (1, 2, 3)
WIDTHS = (64, 128, 256)


class Encoder(nn.Module):
    """The backbone, its maps in a dictionary as the model wants them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        return dict(enumerate(self.network(x)))


class Fitted(nn.Module):
    """Maps through a 1 x 1 convolution each: before `inner`, or behind it."""

    def __init__(self, inner: nn.Module, before: bool, channels: list[tuple[int, int]]) -> None:
        super().__init__()
        self.inner, self.before = inner, before
        self.widths = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in channels)

    def forward(self, x: Any) -> Any:
        maps = x if self.before else self.inner(x)
        maps = [width(level) for width, level in zip(self.widths, maps, strict=True)]
        return self.inner(maps) if self.before else maps


class LiteReverseDistillation(ReverseDistillationModel):
    """`ReverseDistillationModel` with its parts sized for another backbone."""

    def __init__(self, images: Images) -> None:
        nn.Module.__init__(self)
        self.tiler = None
        channels = list(images.network.feature_info.channels())
        self.encoder = Encoder(images.network)
        self.bottleneck = Fitted(get_bottleneck_layer("resnet18"), True, list(zip(channels, WIDTHS, strict=True)))
        self.decoder = Fitted(get_decoder("resnet18"), False, list(zip(WIDTHS, channels, strict=True)))
        size = images.backbone.params.image_size
        self.anomaly_map_generator = AnomalyMapGenerator(image_size=size, mode=AnomalyMapGenerationMode.ADD)


class ReverseDistillation(Peer):
    """Settings: `epochs`, `batch_size`; optimiser as in anomalib's module."""

    def fit(self) -> None:
        levels = self.images.train_maps()
        model, loss_of = self.model, ReverseDistillationLoss()
        learnt = chain(model.decoder.parameters(), model.bottleneck.parameters())
        optimiser = torch.optim.Adam(learnt, lr=0.005, betas=(0.5, 0.99))
        model.train()
        for _ in range(self.settings["epochs"]):
            for chosen in torch.randperm(len(levels[0])).split(self.settings["batch_size"]):
                seen = [level[chosen] for level in levels]
                loss = loss_of(seen, model.decoder(model.bottleneck(seen)))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
        model.eval()


def build(settings: dict[str, Any], seed: int, inputs: Inputs) -> ReverseDistillation:
    """See `benchmarks.contest.contender`."""
    images = Images(inputs, LEVELS)
    return ReverseDistillation(images, LiteReverseDistillation(images), settings)
