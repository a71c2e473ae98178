import numpy as np
import pytest

from tests.serving.lines import BACKBONE, LIMITS, MAP_SIZE
from wtflow import cost
from wtflow.detector import Detector, Scorer
from wtflow.features.backbone import build_backbone
from wtflow.features.fusion import Fusion, FusionParams
from wtflow.flow.coupling import CouplingParams
from wtflow.flow.solver import SolverParams
from wtflow.flow.velocity import VelocityParams, build_field
from wtflow.scoring.calibration import Calibration
from wtflow.scoring.density import ScoreParams

CHANNELS, COMPONENTS, WIDTH, DEPTH = 112, 32, 8, 2


@pytest.fixture(scope="module")
def detector() -> Detector:
    fusion = FusionParams(levels=(3,), stride=16, smooth=False, norm="whiten", components=COMPONENTS)
    velocity = VelocityParams(kind="location", width=WIDTH, depth=DEPTH, norm="batch")
    scorer = Scorer(
        Fusion(fusion, CHANNELS, MAP_SIZE),
        build_field(velocity, COMPONENTS, MAP_SIZE),
        CouplingParams(kind="independent", candidates=8),
        SolverParams(start=0.5, steps=1),
        ScoreParams(kind="energy", balance="none", top_fraction=0.03),
    )
    return Detector(build_backbone(BACKBONE), scorer.freeze(), Calibration(np.zeros(30), 0.1, 1.0), LIMITS)


def test_the_heads_operations_are_those_of_its_matrices(detector: Detector) -> None:
    """Whitening with the field's first layer, the rest of the field, whose last layer reaches no more axes than it is
    wide; what depends on the time alone was worked out when it was frozen."""
    places = MAP_SIZE[0] * MAP_SIZE[1]
    whitening = places * CHANNELS * (COMPONENTS + WIDTH)
    field = places * (WIDTH * min(WIDTH, COMPONENTS) + DEPTH * 2 * WIDTH * 2 * WIDTH)
    assert cost.multiply_accumulates(detector).head == whitening + field


def test_the_backbones_operations_grow_with_the_image(detector: Detector) -> None:
    """At 224 pixels its authors state 407 M for the whole network; here are 64 pixels, and what lies behind level 3 is
    not run."""
    found = cost.multiply_accumulates(detector)
    assert 0.5 < found.backbone / (0.407e9 * (64 / 224) ** 2) < 0.9


def test_parameters_are_counted_by_hand(detector: Detector) -> None:
    places = MAP_SIZE[0] * MAP_SIZE[1]
    enter, leave = COMPONENTS * WIDTH + WIDTH, WIDTH * COMPONENTS + COMPONENTS
    block = WIDTH + (WIDTH * WIDTH + WIDTH) + (2 * WIDTH * WIDTH + 2 * WIDTH) + (2 * WIDTH * WIDTH + WIDTH)
    assert cost.parameters(detector).head == enter + places * WIDTH + DEPTH * block + leave
