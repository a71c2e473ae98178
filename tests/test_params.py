import datetime
from typing import Any, Self

import pytest
from pydantic import ValidationError, model_validator

from wtflow.errors import WTFlowError
from wtflow.params import Section, merged


class Inner(Section):
    size: tuple[int, int]


class Outer(Section):
    rate: float
    count: int
    inner: Inner
    name: str | None = None


GOOD: dict[str, Any] = {"rate": 0.5, "count": 3, "inner": {"size": [4, 6]}}


def test_plain_values_become_typed_ones() -> None:
    assert Outer.parse(GOOD, "train") == Outer(rate=0.5, count=3, inner=Inner(size=(4, 6)), name=None)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rte": 1.0}, r"train\.rte"),
        ({"rate": "0.5"}, r"train\.rate"),
        ({"rate": float("nan")}, r"train\.rate"),
        ({"rate": float("inf")}, r"train\.rate"),
        ({"rate": None}, r"train\.rate"),
        ({"count": 3.5}, r"train\.count"),
        ({"count": True}, r"train\.count"),
        ({"inner": {"size": [4]}}, r"train\.inner\.size"),
        ({"inner": {"size": [4, 6], "sizes": 1}}, r"train\.inner\.sizes"),
        ({"name": 12}, r"train\.name"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_place(change: dict[str, Any], field: str) -> None:
    with pytest.raises(WTFlowError, match=field) as raised:
        Outer.parse(GOOD | change, "train")
    assert "known keys: rate, count, inner, name" in str(raised.value)


def test_keys_that_do_not_go_together_are_told_without_the_whole_section() -> None:
    class Pair(Section):
        low: float
        high: float

        @model_validator(mode="after")
        def _in_order(self) -> Self:
            if self.low > self.high:
                raise ValueError("low is above high")
            return self

    with pytest.raises(WTFlowError) as raised:
        Pair.parse({"low": 2.0, "high": 1.0}, "train.pair")
    assert str(raised.value).splitlines()[1:] == [
        "  train.pair: Value error, low is above high",
        "  known keys: low, high",
    ]


def test_a_missing_key_is_named() -> None:
    with pytest.raises(WTFlowError, match=r"train\.count: Field required"):
        Outer.parse({key: value for key, value in GOOD.items() if key != "count"}, "train")


def test_a_date_of_yaml_is_an_error_for_people() -> None:
    with pytest.raises(WTFlowError, match="quotes"):
        Outer.parse(GOOD | {"name": datetime.date(2026, 1, 2)}, "train")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Outer.parse(GOOD, "train").rate = 1.0  # type: ignore[misc]


def test_overrides_go_group_by_group_and_change_nothing_else() -> None:
    base = {"a": 1, "group": {"x": 1, "y": [1, 2]}, "z": {"k": 1}}
    assert merged(base, {"group": {"y": [3]}, "z": 5, "new": {"n": 1}}) == {
        "a": 1,
        "group": {"x": 1, "y": [3]},
        "z": 5,
        "new": {"n": 1},
    }
    assert base == {"a": 1, "group": {"x": 1, "y": [1, 2]}, "z": {"k": 1}}
