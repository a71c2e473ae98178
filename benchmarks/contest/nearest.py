"""Nearest neighbours on our own features as a contender (`benchmarks.neighbours`)."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import Tensor

from benchmarks import neighbours
from benchmarks.contest.contender import Inputs
from wtflow.data.shards import FeatureShards
from wtflow.features.backbone import BackboneParams, build_backbone, load_weights
from wtflow.features.fusion import FusionParams, build_fusion
from wtflow.scoring.anomaly_map import enlarge


class Nearest:
    """Settings: `fusion`, as in `TrainParams`."""

    def __init__(self, settings: dict[str, Any], seed: int, inputs: Inputs) -> None:
        self.seed, self.shards = seed, FeatureShards.open(inputs.fit)
        params = BackboneParams.parse(self.shards.header["backbone"], "features")
        self.backbone = build_backbone(params, load_weights(inputs.fit / "backbone.safetensors"))
        self.rows = self.shards.rows(split="train")
        fusion = FusionParams.parse(settings["fusion"], "fusion")
        self.fusion = build_fusion(fusion, self.shards.batch(self.rows[:1]), params.image_size)
        self.memory_MC: Tensor

    def fit(self) -> None:
        self.fusion.learn_statistics(self.shards.batches(self.rows, 32))
        self.memory_MC = neighbours.memorise(self.fusion, self.shards, self.rows, self.seed)

    def embed(self, images_BYX3: Tensor) -> object:
        return self.backbone(images_BYX3)

    def score(self, images_BYX3: Tensor) -> tuple[Tensor, Tensor]:
        map_BHW = neighbours.distances(self.fusion, self.memory_MC, self.backbone(images_BYX3))
        return map_BHW.flatten(1).amax(dim=1), enlarge(map_BHW, self.backbone.params.image_size)

    def tensors(self) -> Iterable[Tensor]:
        network = self.backbone.network
        return chain(network.parameters(), network.buffers(), self.fusion.buffers(), [self.memory_MC])


def build(settings: dict[str, Any], seed: int, inputs: Inputs) -> Nearest:
    """See `benchmarks.contest.contender`."""
    return Nearest(settings, seed, inputs)
