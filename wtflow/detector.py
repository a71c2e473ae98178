"""From a photograph to a verdict: one pass of the backbone, one evaluation of the field.

picture --preprocess--> uint8 --backbone--> {level: map} --fusion--> x0_BCHW --euler--> y_BCHW
        --energy--> map_BHW --enlarge, top mean--> score --calibration--> p-value, decision
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from wtflow.data.images import ImageLimits, preprocess
from wtflow.features.backbone import Backbone
from wtflow.features.fusion import Fusion
from wtflow.flow.coupling import COUPLINGS, CouplingParams
from wtflow.flow.solver import euler
from wtflow.scoring.anomaly_map import enlarge
from wtflow.scoring.calibration import Calibration
from wtflow.scoring.density import ScoreParams, energy, scored, top_mean
from wtflow.shapes import AnomalyMap, ImageScores


@dataclass(frozen=True)
class Verdict:
    """What is said of one photograph."""

    score: float
    """Raw anomaly score, never clamped or normalised."""
    p_value: float
    """Share of calibration normals that score at least as high, itself counted: small for anomalies."""
    threshold: float
    """Score above which an image is anomalous."""
    is_anomalous: bool
    anomaly_map: NDArray[np.float32]
    """Energy for each place of the feature map, [H, W]; 0 in the well, unbounded above."""
    needs_review: bool = False
    """Not anomalous, but near enough that a person should look: see `Calibration.needs_review`."""


class Scorer(nn.Module):
    """The head: cached features -> energies and image scores. Holds what training learns."""

    def __init__(self, fusion: Fusion, field: nn.Module, coupling: CouplingParams, score: ScoreParams) -> None:
        super().__init__()
        self.fusion, self.field = fusion, field
        self.step, self.params = COUPLINGS[coupling.kind].step, score

    @torch.inference_mode()
    def forward(self, levels: Mapping[int, Tensor]) -> tuple[AnomalyMap, ImageScores]:
        """Maps B x H x W on the scale of `ScoreParams.kind`, and one score an image."""
        x0_BCHW = self.fusion(levels)
        energy_BHW = energy(euler(self.field, x0_BCHW, self.step))
        map_BHW = scored(energy_BHW, self.params)
        height, width = (4 * side for side in map_BHW.shape[1:])
        return map_BHW, top_mean(enlarge(map_BHW, (height, width)), self.params.top_fraction)


@dataclass(frozen=True)
class Detector:
    """A line's backbone, head and calibration, ready to score. In evaluation mode, on one device."""

    backbone: Backbone
    scorer: Scorer
    calibration: Calibration
    limits: ImageLimits

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that photographs are resized to."""
        return self.backbone.params.image_size

    def verdicts(self, pictures: Sequence[Image.Image]) -> list[Verdict]:
        """Verdicts on RGB pictures of any size, as one batch."""
        if not pictures:
            return []
        pixels = np.stack([preprocess(picture, self.image_size) for picture in pictures])
        device = self.backbone.mean_C11.device
        return self.verdicts_of_features(self.backbone(torch.from_numpy(pixels).to(device)))

    def verdicts_of_features(self, levels: Mapping[int, Tensor]) -> list[Verdict]:
        """Verdicts on features {level: B x C x H x W}, as the backbone gives them and the shards hold them."""
        device = self.backbone.mean_C11.device
        map_BHW, score_B = self.scorer({level: maps.to(device) for level, maps in levels.items()})
        scores = score_B.double().cpu().numpy()
        threshold, p_values = self.calibration.threshold, self.calibration.p_value(scores)
        return [
            Verdict(
                float(score), float(p), threshold, bool(score > threshold), map_HW, self.calibration.needs_review(score)
            )
            for score, p, map_HW in zip(scores, p_values, map_BHW.float().cpu().numpy(), strict=True)
        ]
