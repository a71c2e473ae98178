"""From a photograph to a verdict: one pass of the backbone, one evaluation of the field.

picture --preprocess--> uint8 --backbone--> {level: map} --fusion--> x0_BCHW --euler--> y_BCHW
        --energy--> map_BHW --enlarge, pool--> score --calibration--> p-value, decision
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from wtflow.data.images import ImageLimits, preprocess
from wtflow.errors import ImageError
from wtflow.features.backbone import Backbone
from wtflow.features.fusion import Fusion
from wtflow.flow.coupling import CouplingParams, build_coupling, step_size
from wtflow.flow.fold import folded
from wtflow.flow.solver import SolverParams, euler
from wtflow.flow.velocity import LocationNet, VelocityField, VelocityNet
from wtflow.place_head import PlaceHead
from wtflow.scoring.anomaly_map import enlarge
from wtflow.scoring.calibration import Calibration
from wtflow.scoring.density import ScoreParams, energy, pooled, scored, units, usual_products
from wtflow.shapes import AnomalyMap, FeatureMap, ImageScores


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

    c: Tensor
    """Constant of the coupling. One that is not exact is NaN until training has measured it or weights are loaded."""
    usual_CC: Tensor
    """Second moments that y is measured by: the identity, or what `learn_usual` has found."""
    unit_CC: Tensor | None
    """`units` of them, worked out by `freeze`."""

    def __init__(
        self, fusion: Fusion, field: VelocityNet, coupling: CouplingParams, solver: SolverParams, score: ScoreParams
    ) -> None:
        super().__init__()
        self.fusion, self.field = fusion, field
        self.solver, self.params = solver, score
        self._fixed: list[nn.Module] = []  # in a list, so that its weights are not saved twice
        exact = build_coupling(coupling).c
        self.register_buffer("c", torch.tensor(math.nan if exact is None else exact))
        self.register_buffer("usual_CC", torch.eye(fusion.channels))
        self.register_buffer("unit_CC", None, persistent=False)

    def freeze(self) -> "Scorer":
        """Evaluation mode for good, on the device it is on: what is fixed from here on is worked out once."""
        self.eval().requires_grad_(False)
        self.unit_CC = units(self.usual_CC)
        if self.solver.steps > 1:
            return self
        if isinstance(self.field, LocationNet) and self.fusion.params.norm == "whiten":
            step = step_size(self.c.item())
            self._fixed = [PlaceHead(self.fusion, self.field, step, self.solver.start, self.unit_CC)]
        else:
            self._fixed = [folded(self.field, self.solver.start)]
        return self

    @torch.inference_mode()
    def learn_usual(self, batches: Iterable[Mapping[int, Tensor]]) -> None:
        """Set what normal images leave of y, from features of the training images; before `freeze`."""
        x0_of = (self.fusion(levels) for levels in batches)
        self.usual_CC.copy_(usual_products((x0_BCHW, self.transported(x0_BCHW, self.field)) for x0_BCHW in x0_of))

    def transported(self, x0_BCHW: FeatureMap, field: VelocityField) -> FeatureMap:
        """y: where the solver takes x0 along `field`."""
        return euler(field, x0_BCHW, step_size(self.c.item()), self.solver.steps, self.solver.start)

    def _energy(self, levels: Mapping[int, Tensor]) -> AnomalyMap:
        fixed = self._fixed[0] if self._fixed else self.field
        if isinstance(fixed, PlaceHead):
            energy_BHW: AnomalyMap = fixed(levels)
            return energy_BHW
        unit_CC = units(self.usual_CC) if self.unit_CC is None else self.unit_CC
        return energy(self.transported(self.fusion(levels), fixed), unit_CC)

    @torch.inference_mode()
    def forward(self, levels: Mapping[int, Tensor]) -> tuple[AnomalyMap, ImageScores]:
        """Maps B x H x W on the scale of `ScoreParams`, and one score an image."""
        map_BHW = scored(self._energy(levels), self.params)
        height, width = (4 * side for side in map_BHW.shape[1:])
        return map_BHW, pooled(enlarge(map_BHW, (height, width)), self.params)


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
        """Verdicts on pictures of any size, RGB or grey (mode L), as one batch. Raises `ImageError` if a score is not
        finite."""
        return _all_of(self.answers(pictures))

    def answers(self, pictures: Sequence[Image.Image]) -> list[Verdict | ImageError]:
        """The same, but an `ImageError` stands in the place of a picture whose score is not finite: the others have
        their verdicts."""
        if not pictures:
            return []
        pixels = np.stack([preprocess(picture, self.image_size) for picture in pictures])
        device = self.backbone.device
        return self._answers(self.backbone(torch.from_numpy(pixels).to(device)))

    def verdicts_of_features(self, levels: Mapping[int, Tensor]) -> list[Verdict]:
        """Verdicts on features {level: B x C x H x W}, as the backbone gives them and the shards hold them. Raises as
        `verdicts` does."""
        return _all_of(self._answers(levels))

    def _answers(self, levels: Mapping[int, Tensor]) -> list[Verdict | ImageError]:
        device = self.backbone.device
        map_BHW, score_B = self.scorer({level: maps.to(device) for level, maps in levels.items()})
        maps = map_BHW.float().cpu().numpy()
        return [self._answer(score, map_HW) for score, map_HW in zip(score_B.double().tolist(), maps, strict=True)]

    def _answer(self, score: float, map_HW: NDArray[np.float32]) -> Verdict | ImageError:
        if not math.isfinite(score):
            return ImageError(
                "not_an_image", "its score is not finite: its features are beyond float16. Is it a photograph?"
            )
        threshold, p_value = self.calibration.threshold, float(self.calibration.p_value(score))
        return Verdict(score, p_value, threshold, score > threshold, map_HW, self.calibration.needs_review(score))


def _all_of(answers: Sequence[Verdict | ImageError]) -> list[Verdict]:
    verdicts = []
    for answer in answers:
        if isinstance(answer, ImageError):
            raise answer
        verdicts.append(answer)
    return verdicts
