"""WT-Flow as a contender: trained on the cached features, scored by the detector of the bundle that would be served."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import Tensor

from benchmarks.contest.contender import Inputs
from pipelines.train import bundle_config, calibrated
from wtflow.bundle import load_bundle, write_bundle
from wtflow.data.shards import FeatureShards
from wtflow.detector import Detector
from wtflow.features.backbone import load_weights
from wtflow.scoring.anomaly_map import enlarge
from wtflow.training import TrainParams, be_deterministic, finish, start, train


class Preset:
    """Settings: `TrainParams` without the seed."""

    def __init__(self, params: TrainParams, inputs: Inputs) -> None:
        self.params, self.inputs = params, inputs
        self.shards = FeatureShards.open(inputs.fit)
        self.detector: Detector

    def fit(self) -> None:
        be_deterministic()
        shards, bundle = self.shards, self.inputs.scratch / "bundle"
        state = start(shards, self.params)
        train(state, shards, self.params)
        scorer = finish(state, shards)
        config = bundle_config(self.params, shards, scorer)
        weights = load_weights(shards.folder / "backbone.safetensors")
        calibration = calibrated(scorer, shards, self.params)
        write_bundle(bundle, config, weights, scorer, calibration, {"seed": self.params.seed})
        self.detector = load_bundle(bundle).detector()

    def embed(self, images_BYX3: Tensor) -> object:
        return self.detector.backbone(images_BYX3)

    def score(self, images_BYX3: Tensor) -> tuple[Tensor, Tensor]:
        map_BHW, score_B = self.detector.scorer(self.detector.backbone(images_BYX3))
        return score_B, enlarge(map_BHW, self.detector.image_size)

    def tensors(self) -> Iterable[Tensor]:
        parts = (self.detector.backbone.network, self.detector.scorer)  # the lean copy is not shipped
        return chain.from_iterable(chain(part.parameters(), part.buffers()) for part in parts)


def build(settings: dict[str, Any], seed: int, inputs: Inputs) -> Preset:
    """See `benchmarks.contest.contender`."""
    return Preset(TrainParams.parse({**settings, "seed": seed}, "preset"), inputs)
