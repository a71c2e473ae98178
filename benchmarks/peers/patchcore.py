"""PatchCore (arXiv 2106.08265): anomalib's torch model. A memory of patches, thinned by its greedy coreset."""

from typing import Any

from anomalib.models.image.patchcore.torch_model import PatchcoreModel

from benchmarks.contest.contender import Inputs
from benchmarks.peers.shared import Images, Peer


class PatchCore(Peer):
    """Settings: `coreset_ratio`, the share of patches that is kept."""

    def fit(self) -> None:
        self.model.train()
        for batch_BYX3 in self.images.train_NYX3.split(32):
            self.model(self.images.normalised(batch_BYX3))
        self.model.subsample_embedding(self.settings["coreset_ratio"])
        self.model.eval()


def build(settings: dict[str, Any], seed: int, inputs: Inputs) -> PatchCore:
    """See `benchmarks.contest.contender`."""
    images = Images(inputs)
    model = PatchcoreModel(images.levels, images.name, pre_trained=False, num_neighbors=9)
    model.feature_extractor.feature_extractor = images.network
    return PatchCore(images, model, settings)
