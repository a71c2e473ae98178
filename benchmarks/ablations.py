"""What each part of the default is worth: one setting changed at a time, every line, three seeds, final weights.

`make repro` brings the lines. What was measured is kept in .wtflow/bench/ablations. --variant, --line and --seed
measure a part; the table holds what is there.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.contest.methods import preset
from benchmarks.contest.trial import key
from benchmarks.product_lines import PLACE, ProductLine, extract_features, image_auroc, product_lines
from benchmarks.report import publish
from pipelines.kept_field import NOT_TRAINED_WITH
from wtflow.artefact import digest_of, read_json, write_json
from wtflow.data.shards import FeatureShards
from wtflow.detector import Scorer
from wtflow.params import merged
from wtflow.training import TrainingState, TrainParams, be_deterministic, finish, start, train

SEEDS = (0, 1, 2)
KEPT = PLACE / "ablations"

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "start 0": {"solver": {"start": 0.0}},
    "start 0.25": {"solver": {"start": 0.25}},
    "start 0.75": {"solver": {"start": 0.75}},
    "start 0, 4 steps": {"solver": {"start": 0.0, "steps": 4}},
    "start 0.5, 4 steps": {"solver": {"steps": 4}},
    "density": {"score": {"kind": "density"}},
    "no balance": {"score": {"balance": "none"}},
    "highest place": {"score": {"top_fraction": 0.0001}},
    "top 3 %": {"score": {"top_fraction": 0.03}},
    "top 10 %": {"score": {"top_fraction": 0.1}},
    "quantile": {"score": {"pool": "quantile"}},
    "rarity 0": {"batches": {"rarity": 0.0}},
    "rarity 2": {"batches": {"rarity": 2.0}},
    "location-wt": {"coupling": {"kind": "location-wt"}},
    "sign-wt": {"coupling": {"kind": "sign-wt"}},
    "antipode": {"coupling": {"kind": "antipode"}},
    "sink": {"coupling": {"kind": "sink"}},
    # these two deal noise out among the samples of a batch, of 2,048 places for hours; so among 8 images
    "whole images": {"batches": {"kind": "images"}},
    "whole images, batch-wt": {"batches": {"kind": "images"}, "coupling": {"kind": "batch-wt"}},
    "whole images, batch-ot": {"batches": {"kind": "images"}, "coupling": {"kind": "batch-ot"}},
    "uniform times": {"time": {"kind": "uniform"}},
    "times near the data": {"time": {"kind": "singular"}},
    "layer norm": {"fusion": {"norm": "layer"}},
    "channel norm": {"fusion": {"norm": "channel"}},
    "level 3, 16 x 16": {"fusion": {"levels": [3], "stride": 16}},
    "width 32": {"velocity": {"width": 32}},
    "width 128": {"velocity": {"width": 128}},
    "8 epochs": {"epochs": 8},
    "12 epochs": {"epochs": 12},
}
"""Name -> what it lays over the line's `train` settings."""


@dataclass(frozen=True)
class Trial:
    """A variant on a line with a seed."""

    variant: str
    line: ProductLine
    seed: int

    @property
    def params(self) -> TrainParams:
        """All settings of the training."""
        values = merged(self.line.train_params.model_dump(mode="json"), VARIANTS[self.variant])
        return TrainParams.parse(values | {"seed": self.seed}, f"variant {self.variant}")

    @property
    def training(self) -> str:
        """Digest of the settings that the field depends on: trials that share it share a training."""
        return digest_of(self.params.model_dump(mode="json", exclude=NOT_TRAINED_WITH))

    @property
    def path(self) -> Path:
        """Where the figure is kept."""
        method = preset("default", VARIANTS[self.variant], self.line)
        return KEPT / f"{self.line.name}-{self.seed}-{key(method, self.line, self.seed)[:12]}.json"


def main() -> None:
    """Measure what is missing of what was asked for, then publish all there is."""
    asked, console = _arguments(), Console(highlight=False, soft_wrap=True)
    lines = product_lines()
    wanted = [
        Trial(variant, line, seed)
        for line in lines
        for seed in SEEDS
        for variant in VARIANTS
        if (not asked.variant or variant in asked.variant)
        and asked.line in (None, line.name)
        and asked.seed in (None, seed)
    ]
    for trials in _by_training(wanted):
        for trial, value in _measured([trial for trial in trials if not trial.path.exists()]):
            write_json(trial.path, {"image_auroc": value})
            console.print(f"{trial.variant}, {trial.line.name}, seed {trial.seed}: {value:.4f}")
    publish("ablations", [row for variant in VARIANTS if (row := _row(variant, lines))], [])


def _by_training(trials: list[Trial]) -> Iterator[list[Trial]]:
    def shared(trial: Trial) -> tuple[str, int, str]:
        return trial.line.name, trial.seed, trial.training

    order = {trial.variant: index for index, trial in reversed(list(enumerate(trials)))}
    for _, group in groupby(sorted(trials, key=shared), key=shared):
        yield sorted(group, key=lambda trial: order[trial.variant])


def _measured(trials: list[Trial]) -> Iterator[tuple[Trial, float]]:
    if not trials:
        return
    line, params = trials[0].line, trials[0].params
    extract_features(line)
    fit, test = line.shards("fit"), line.shards("test")
    be_deterministic()
    state = start(fit, params)
    train(state, fit, params)
    for trial in trials:
        yield trial, image_auroc(_asked_with(state, fit, trial.params), test)


def _asked_with(state: TrainingState, fit: FeatureShards, params: TrainParams) -> Scorer:
    """The trained field under other settings of solver and score."""
    old = state.scorer
    scorer = Scorer(old.fusion, old.field, params.coupling, params.solver, params.score)
    scorer.c.copy_(old.c)
    return finish(TrainingState(scorer, state.params, state.history), fit)


def _row(variant: str, lines: list[ProductLine]) -> dict[str, Any]:
    """Mean and standard deviation of each line, once all its seeds are there."""
    row: dict[str, Any] = {}
    for line in lines:
        paths = [Trial(variant, line, seed).path for seed in SEEDS]
        if all(path.exists() for path in paths):
            values = [read_json(path)["image_auroc"] for path in paths]
            row |= {line.name: statistics.mean(values), f"{line.name} sd": statistics.stdev(values)}
    return {"variant": variant} | row if row else {}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: make bench NAME=ablations")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="measure this one only; may be repeated")
    parser.add_argument("--line", help="measure this line only")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="measure this seed only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
