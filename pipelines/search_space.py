"""What `python -m pipelines.tune` searches, how, and by which measure: the section `tune` of params.yaml."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from wtflow.data.synthetic import DefectKind
from wtflow.errors import WTFlowError
from wtflow.params import Section, merged
from wtflow.training import TrainParams

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Plain = bool | int | float | str | None
DIGITS = 3
"""Significant digits of a drawn number: what is tried is what can be read, and written to params.yaml."""


class FloatRange(Section):
    """A number between `low` and `high`."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    """Even over the logarithm; for a number whose order of magnitude is open."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_ends(self.low, self.high, self.log)
        return self

    def value(self, drawn: Any) -> float:
        """The number that is tried."""
        return min(max(float(f"{drawn:.{DIGITS}g}"), self.low), self.high)

    def holds(self, value: Any) -> bool:
        """Whether it could be drawn."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def ends(self) -> tuple[Plain, ...]:
        """Values that stand for all when settings are checked."""
        return (self.low, self.high)


class IntRange(Section):
    """A whole number from `low` to `high`, both included, in steps."""

    type: Literal["int"]
    low: int
    high: int
    step: Count = 1
    """low, low + step, ...: a width that must be even starts at an even number and has a step of 2."""
    log: bool = False
    """As in `FloatRange`."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_ends(self.low, self.high, self.log)
        if (self.high - self.low) % self.step:
            raise ValueError(f"high {self.high} is no whole number of steps of {self.step} above low {self.low}")
        return self

    def value(self, drawn: Any) -> int:
        """The number that is tried: the nearest step."""
        steps: int = round((drawn - self.low) / self.step)
        return self.low + steps * self.step

    def holds(self, value: Any) -> bool:
        """Whether it could be drawn."""
        return isinstance(value, int) and self.low <= value <= self.high and (value - self.low) % self.step == 0

    def ends(self) -> tuple[Plain, ...]:
        """Values that stand for all when settings are checked."""
        return (self.low, self.low + self.step, self.high)


class Choice(Section):
    """One of some values."""

    type: Literal["choice"]
    values: Annotated[tuple[Plain, ...], Field(min_length=2)]

    def value(self, drawn: Any) -> Plain:
        """The value that is tried."""
        chosen: Plain = drawn
        return chosen

    def holds(self, value: Any) -> bool:
        """Whether it could be drawn."""
        return value in self.values

    def ends(self) -> tuple[Plain, ...]:
        """All of them."""
        return self.values


def _check_ends(low: float, high: float, log: bool) -> None:
    if low >= high:
        raise ValueError(f"low {low} must be below high {high}")
    if log and low <= 0:
        raise ValueError(f"log: true needs a low above 0, not {low}")


class SyntheticDefects(Section):
    """Image AUROC of damaged copies of normal images against these images, mean over the kinds of defect."""

    kind: Literal["synthetic"]
    normals: Literal["train", "calibrate"]
    """train: some of its groups are held out of the trials' training, and `calibrate` stays untouched, so that the rate
    of false alarms that the threshold promises still holds. calibrate: trials train on all of `train`; the settings
    then know the images that the threshold comes from."""
    share: Annotated[float, Field(gt=0, lt=1)]
    """Of the groups of `train` that are held out; with `normals: train`."""
    defects: Annotated[tuple[DefectKind, ...], Field(min_length=1)]
    """Kinds, as wtflow/data/synthetic.py makes them."""
    seed: Annotated[int, Field(ge=0)]
    """Of the defects and of the groups held out."""


class LabelledImages(Section):
    """Image AUROC on images of yours, which may not be among those of the line."""

    kind: Literal["labelled"]
    folder: str
    """Holds the folders `normal` and `anomalous`."""


class Budget(Section):
    """When the search ends: at whichever comes first."""

    trials: Count | None
    minutes: Positive | None
    """Time at work; what passes between a kill and the next start does not count."""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.trials is None and self.minutes is None:
            raise ValueError("trials and minutes are both null: the search would not end. Give one of them")
        return self


class Halving(Section):
    """ASHA: trials that are behind are stopped early."""

    grace_epochs: Count
    """No trial is stopped before."""
    reduction: Annotated[int, Field(ge=2)]
    """One in so many goes on at each rung; rungs are at grace_epochs, grace_epochs * reduction, and so on."""


class TuneParams(Section):
    """Settings of the search."""

    space: Annotated[
        dict[str, Annotated[FloatRange | IntRange | Choice, Field(discriminator="type")]], Field(min_length=1)
    ]
    """Keys of `train`, with dots for groups: `velocity.width`."""
    objective: Annotated[SyntheticDefects | LabelledImages, Field(discriminator="kind")]
    budget: Budget
    concurrency: Count
    """Trials at a time, a core each. Two searches try the same only with 1: Optuna learns in the order in which trials
    end."""
    seed: Annotated[int, Field(ge=0)]
    """Of Optuna's sampler."""
    halving: Halving

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Plain]:
        """What is tried for what was drawn."""
        return {key: domain.value(drawn[key]) for key, domain in self.space.items()}

    def current(self, base: Mapping[str, Any]) -> dict[str, Plain] | None:
        """The settings as they stand as a point of the space, to all their digits; None if they lie outside of it."""
        found = {key: _at(base, key) for key in self.space}
        inside = all(domain.holds(found[key]) for key, domain in self.space.items())
        return found if inside else None

    def check(self, base: Mapping[str, Any], where: str) -> None:
        """Raise a `WTFlowError` for a key that `train` does not have, or a value that it would refuse."""
        for key, domain in self.space.items():
            _at(base, key)
            for end in domain.ends():
                TrainParams.parse(merged(base, nested({key: end})), f"{where}.space.{key}: train")


def nested(values: Mapping[str, Plain]) -> dict[str, Any]:
    """`{"velocity.width": 8}` as `{"velocity": {"width": 8}}`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        *groups, last = key.split(".")
        place = result
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return result


def _at(base: Mapping[str, Any], key: str) -> Any:
    place: Any = base
    for part in key.split("."):
        if not isinstance(place, Mapping) or part not in place:
            raise WTFlowError(
                f"params.yaml: tune.space.{key}: no such key in `train`. It has "
                f"{', '.join(TrainParams.model_fields)}; those of a group have a dot, as velocity.width."
            )
        place = place[part]
    if isinstance(place, Mapping):
        raise WTFlowError(
            f"params.yaml: tune.space.{key}: a group of settings. Name one of its keys: {', '.join(place)}."
        )
    return place
