"""PatchCore (arXiv 2106.08265): anomalib's torch model. A memory of patches, thinned to a greedy coreset."""

from typing import Any

import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from torch import nn

from benchmarks.contest.contender import Inputs
from benchmarks.peers.coreset import k_centre
from benchmarks.peers.shared import Images, Peer


class PatchCore(Peer):
    """Settings: `coreset_ratio`, the share of patches that is kept."""

    def __init__(self, images: Images, model: nn.Module, settings: dict[str, Any], seed: int) -> None:
        super().__init__(images, model, settings)
        self.seed = seed

    def fit(self) -> None:
        self.model.train()
        for batch_BYX3 in self.images.train_NYX3.split(32):
            self.model(self.images.backbone.normalised(batch_BYX3))
        patches_NC = torch.vstack(self.model.embedding_store)
        self.model.embedding_store.clear()
        count = round(self.settings["coreset_ratio"] * len(patches_NC))
        self.model.memory_bank = patches_NC[k_centre(patches_NC, count, self.seed)]
        self.model.eval()


def build(settings: dict[str, Any], seed: int, inputs: Inputs) -> PatchCore:
    """See `benchmarks.contest.contender`."""
    images = Images(inputs)
    model = PatchcoreModel(images.levels, images.name, pre_trained=False, num_neighbors=9)
    model.feature_extractor.feature_extractor = images.network
    return PatchCore(images, model, settings, seed)
