"""What every combination of coupling, velocity field and score has to keep. A new kind joins by being declared."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.guards.closure import ROOT
from tests.tiny_line import train_params, trained
from wtflow.data.shards import FeatureShards
from wtflow.flow.coupling import CouplingParams, build_coupling
from wtflow.flow.loss import matching_loss
from wtflow.flow.path import interpolate
from wtflow.flow.velocity import VelocityParams
from wtflow.params import Section
from wtflow.scoring.density import ScoreParams
from wtflow.training import TrainingState, TrainParams, finish, start

DEFAULT: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["train"]


def choices(section: type[Section]) -> Iterator[dict[str, str]]:
    """Every combination of the words that a section's settings can be."""
    words = {
        name: get_args(field.annotation)
        for name, field in section.model_fields.items()
        if get_origin(field.annotation) is Literal
    }
    for combination in product(*words.values()):
        yield dict(zip(words, combination, strict=True))


CASES = [
    {"coupling": coupling, "velocity": DEFAULT["velocity"] | {"width": 8} | velocity, "score": score}
    for coupling in choices(CouplingParams)
    for velocity in choices(VelocityParams)
    for score in choices(ScoreParams)
    if velocity["kind"] == "unet" or velocity["norm"] == "batch"  # `location` has no such norm
]


def words(case: dict[str, dict[str, Any]]) -> str:
    return "-".join(str(value) for part in case.values() for value in part.values() if isinstance(value, str))


@pytest.fixture(params=CASES, ids=words)
def params(request: pytest.FixtureRequest) -> TrainParams:
    return train_params(epochs=1, **request.param)


def scored(state: TrainingState, levels: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    map_BHW, score_B = state.scorer(levels)
    return map_BHW, score_B


def velocity_pair(state: TrainingState, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """In training, which leaves this batch's statistics behind, and then in evaluation."""
    for module in state.scorer.field.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        return state.scorer.field.train()(x, t), state.scorer.field.eval()(x, t)


def test_the_contract(params: TrainParams, tiny_fit: FeatureShards, tmp_path: Path) -> None:
    state, again = trained(tiny_fit, params), trained(tiny_fit, params)
    levels = tiny_fit.batch(tiny_fit.rows(split="calibrate"))

    map_BHW, score_B = scored(state, levels)
    assert map_BHW.shape == (len(score_B), 8, 8)
    assert map_BHW.isfinite().all()
    assert map_BHW.min() >= 0
    assert score_B.unique().numel() > 1
    assert torch.equal(score_B, scored(again, levels)[1])

    state.save(tmp_path)
    loaded = start(tiny_fit, params)
    assert not torch.equal(scored(loaded, levels)[1], score_B)
    loaded.load(tmp_path)
    finish(loaded, tiny_fit)
    assert torch.equal(scored(loaded, levels)[0], map_BHW)
    assert torch.equal(loaded.scorer.c, state.scorer.c)

    generator = torch.Generator().manual_seed(0)
    x0 = state.scorer.fusion(levels).clone()
    x1, t = build_coupling(params.coupling).draw(x0, generator), torch.rand(len(x0), generator=generator)
    sample = interpolate(x0, x1, t)
    state.scorer.field.train().requires_grad_().zero_grad()
    matching_loss(state.scorer.field, sample).sum().backward()
    without = [
        name for name, value in state.scorer.field.named_parameters() if value.grad is None or not value.grad.any()
    ]
    assert without == []

    learning, done = velocity_pair(state, sample.x_BCHW, t)
    assert learning.shape == done.shape == x0.shape
    assert (learning - done).norm() < 0.1 * done.norm()  # a batch's variance is divided by n, the running one by n - 1


def test_the_cases_are_all_of_them() -> None:
    assert len(CASES) == len({words(case) for case in CASES})
    assert {"independent", "location-wt", "sink"} <= {case["coupling"]["kind"] for case in CASES}
    assert {"batch", "group"} <= {case["velocity"]["norm"] for case in CASES}
    assert {"energy", "density"} <= {case["score"]["kind"] for case in CASES}
