"""PaDiM (arXiv 2011.08785): anomalib's torch model. A Gaussian for each place."""

from typing import Any

import torch
from anomalib.models.image.padim.torch_model import PadimModel

from benchmarks.contest.contender import Inputs
from benchmarks.peers.shared import Images, Peer


class Padim(Peer):
    """Settings: `features`, how many channels are kept, at random."""

    def fit(self) -> None:
        self.model.train()
        for batch_BYX3 in self.images.train_NYX3.split(32):
            self.model(self.images.backbone.normalised(batch_BYX3))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # MKL inverts many small matrices wrongly, and for ever, on two threads of some CPUs
        self.model.fit()
        torch.set_num_threads(threads)
        self.model.eval()


def build(settings: dict[str, Any], seed: int, inputs: Inputs) -> Padim:
    """See `benchmarks.contest.contender`."""
    images = Images(inputs)
    model = PadimModel(images.name, images.levels, pre_trained=False, n_features=settings["features"])
    model.feature_extractor.feature_extractor = images.network
    return Padim(images, model, settings)
