"""What anomalib's torch models have in common here: our backbone, our preprocessing, their own scores and maps."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contest.contender import Inputs
from wtflow.features.backbone import BackboneParams, build_backbone


class Images:
    """The shared backbone, and images on the scale that its weights were trained on."""

    def __init__(self, inputs: Inputs, levels: tuple[int, ...] | None = None) -> None:
        """`levels` other than the settings' are for a method that cannot do with those."""
        params = BackboneParams.parse(inputs.backbone, "backbone")
        self.backbone = build_backbone(params if levels is None else params.model_copy(update={"levels": levels}))
        self.name, self.levels = params.name, list(self.backbone.params.levels)
        self.network = Maps(self.backbone.lean)
        self.train_NYX3 = inputs.images_NYX3

    @torch.no_grad()
    def train_maps(self) -> list[Tensor]:
        """Maps of all training images, a tensor a level: a frozen network need not run again in every epoch."""
        parts = [self.network(self.backbone.normalised(batch_BYX3)) for batch_BYX3 in self.train_NYX3.split(8)]
        return [torch.cat(level) for level in zip(*parts, strict=True)]


class Maps(nn.Module):
    """A backbone whose maps lie in memory as anomalib expects them, the channels first."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.feature_info = backbone, backbone.feature_info

    def forward(self, x_B3YX: Tensor) -> list[Tensor]:
        """A map a level."""
        return [map_BCHW.contiguous() for map_BCHW in self.backbone(x_B3YX)]


class Peer:
    """A contender around an anomalib model whose forward pass gives `pred_score` and `anomaly_map`."""

    def __init__(self, images: Images, model: nn.Module, settings: dict[str, Any]) -> None:
        self.images, self.model, self.settings = images, model, settings

    def embed(self, images_BYX3: Tensor) -> object:
        return self.images.network(self.images.backbone.normalised(images_BYX3))

    def score(self, images_BYX3: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(self.images.backbone.normalised(images_BYX3))
        return found.pred_score.flatten(), found.anomaly_map[:, 0]

    def tensors(self) -> Iterable[Tensor]:
        """The model's, with timm's network, which is what is shipped, in place of its lean copy."""
        lean = {id(tensor) for tensor in _tensors(self.images.network)}
        own = [tensor for tensor in _tensors(self.model) if id(tensor) not in lean]
        has_backbone = len(own) < len(list(_tensors(self.model)))
        return chain(own, _tensors(self.images.backbone.network) if has_backbone else ())


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return chain(module.parameters(), module.buffers())
