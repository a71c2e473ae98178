from typing import Any

import pytest
import yaml

from pipelines.search_space import IntRange, TuneParams, nested
from tests.guards.closure import ROOT
from tests.pipelines.searches import TUNE
from tests.tiny_line import TRAIN
from wtflow.errors import WTFlowError
from wtflow.params import merged


def parsed(**changes: Any) -> TuneParams:
    return TuneParams.parse(merged(TUNE, changes), "tune")


def test_the_project_s_own_search_is_valid_and_holds_its_settings() -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    params = TuneParams.parse(values["tune"], "tune")
    params.check(values["train"], "tune")
    assert params.current(values["train"]) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"learning_rate": {"type": "float", "low": 2.0, "high": 1.0}}}, "low 2.0 must be below high 1.0"),
        ({"space": {"learning_rate": {"low": 0.0}}}, "log: true needs a low above 0"),
        ({"space": {"velocity.width": {"values": [8]}}}, "at least 2 items"),
        ({"space": {"velocity.width": {"type": "list"}}}, "'float', 'int', 'choice'"),
        ({"budget": {"trials": None}}, "would not end"),
        ({"budget": {"trials": 0}}, "greater than 0"),
        ({"objective": {"defects": ["rust"]}}, "cut-paste"),
        ({"objective": {"share": 1.0}}, "less than 1"),
        ({"objective": {"folder": "x"}}, "folder"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WTFlowError, match=message):
        parsed(**changes)


@pytest.mark.parametrize(
    ("key", "domain", "message"),
    [
        ("rate", {"type": "int", "low": 1, "high": 2}, r"tune\.space\.rate: no such key"),
        ("velocity.breadth", {"type": "int", "low": 1, "high": 2}, r"tune\.space\.velocity\.breadth: no such key"),
        ("velocity", {"type": "int", "low": 1, "high": 2}, "a group of settings"),
        ("velocity.width", {"type": "float", "low": 1.5, "high": 2}, r"tune\.space\.velocity\.width: train"),
        ("velocity.width", {"type": "int", "low": 8, "high": 16}, r"multiple of 2 \(found 9\)"),
        ("fusion.norm", {"type": "choice", "values": ["layer", "batch"]}, r"tune\.space\.fusion\.norm: train"),
        ("epochs", {"type": "int", "low": 0, "high": 3}, "greater than 0"),
    ],
)
def test_keys_and_values_that_training_would_refuse(key: str, domain: dict[str, Any], message: str) -> None:
    params = TuneParams.parse({**TUNE, "space": {key: domain}}, "tune")
    with pytest.raises(WTFlowError, match=message):
        params.check(TRAIN, "tune")


def test_a_drawn_number_is_short_and_inside() -> None:
    params = parsed(space={"learning_rate": {"low": 0.0012345}})
    assert params.values({"learning_rate": 0.00456789, "velocity.width": 16}) == {
        "learning_rate": 0.00457,
        "velocity.width": 16,
    }
    assert params.values({"learning_rate": 0.0012345, "velocity.width": 8})["learning_rate"] == 0.0012345


def test_a_whole_number_is_drawn_in_steps() -> None:
    width = IntRange(type="int", low=8, high=32, step=8, log=True)
    assert [width.value(drawn) for drawn in (8, 11, 13, 25, 32)] == [8, 8, 16, 24, 32]
    assert width.holds(16)
    assert not width.holds(18)
    with pytest.raises(ValueError, match="no whole number of steps of 8"):
        IntRange(type="int", low=8, high=31, step=8)


def test_settings_outside_of_the_space_are_no_point_of_it() -> None:
    assert parsed().current(TRAIN) == {"learning_rate": 0.003, "velocity.width": 8}
    assert parsed().current(merged(TRAIN, {"learning_rate": 0.00123456})) == {
        "learning_rate": 0.00123456,
        "velocity.width": 8,
    }
    assert parsed(space={"learning_rate": {"low": 0.004}}).current(TRAIN) is None
    assert parsed(space={"velocity.width": {"values": [16, 32]}}).current(TRAIN) is None


def test_dots_are_groups() -> None:
    assert nested({"epochs": 3, "velocity.width": 8, "velocity.depth": 1}) == {
        "epochs": 3,
        "velocity": {"width": 8, "depth": 1},
    }
