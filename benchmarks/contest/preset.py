"""WT-Flow as a contender: trained on the cached features, scored by the detector of the bundle that would be served."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest.contender import Inputs
from wtflow.bundle import BundleConfig, load_bundle, write_bundle
from wtflow.data.images import ImageLimits
from wtflow.data.shards import FeatureShards
from wtflow.detector import Detector
from wtflow.features.backbone import BackboneParams, build_backbone, load_weights
from wtflow.scoring.anomaly_map import enlarge
from wtflow.scoring.calibration import calibrate
from wtflow.training import TrainingState, TrainParams, start, train


class Preset:
    """Settings: `TrainParams` without the seed."""

    def __init__(self, params: TrainParams, inputs: Inputs) -> None:
        self.params, self.inputs = params, inputs
        self.shards = FeatureShards.open(inputs.fit)
        self.detector: Detector

    def fit(self) -> None:
        torch.use_deterministic_algorithms(True)
        state = start(self.shards, self.params)
        train(state, self.shards, self.params)
        bundle = self.inputs.scratch / "bundle"
        self._write(state, bundle)
        self.detector = load_bundle(bundle).detector()

    def embed(self, images_BYX3: Tensor) -> object:
        return self.detector.backbone(images_BYX3)

    def score(self, images_BYX3: Tensor) -> tuple[Tensor, Tensor]:
        map_BHW, score_B = self.detector.scorer(self.detector.backbone(images_BYX3))
        return score_B, enlarge(map_BHW, self.detector.image_size)

    def tensors(self) -> Iterable[Tensor]:
        parts = (self.detector.backbone, self.detector.scorer)
        return chain.from_iterable(chain(part.parameters(), part.buffers()) for part in parts)

    def _write(self, state: TrainingState, path: Any) -> None:
        shards, params = self.shards, self.params
        levels = shards.batch(shards.rows(split="calibrate"))
        map_BHW, score_B = state.scorer(levels)
        config = BundleConfig(
            backbone=BackboneParams.parse(shards.header["backbone"], "features"),
            fusion=params.fusion,
            channels=state.scorer.fusion.channels,
            map_size=state.scorer.fusion.size,
            coupling=params.coupling,
            velocity=params.velocity,
            score=params.score,
            limits=ImageLimits(),
        )
        network = build_backbone(config.backbone, load_weights(shards.folder / "backbone.safetensors"))
        calibration = calibrate(score_B.double().numpy(), map_BHW.numpy().ravel(), params.calibration)
        write_bundle(path, config, network, state.scorer, calibration, {"seed": params.seed})


def build(settings: dict[str, Any], seed: int, inputs: Inputs) -> Preset:
    """See `benchmarks.contest.contender`."""
    return Preset(TrainParams.parse({**settings, "seed": seed}, "preset"), inputs)
