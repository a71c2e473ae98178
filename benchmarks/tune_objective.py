"""Does the search's measure rank settings as the test set would? Rank correlation over a handful of configurations.

Each configuration is trained once a seed, as a trial of the search is, with some groups of `train` held out; the same
weights are judged twice: by the synthetic defects, and by image AUROC on the line's test split, which no search sees.
`make repro` brings the features. What was measured is kept in .wtflow/bench/tune_objective, until settings, code or
images change.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

from benchmarks.contest.methods import preset
from benchmarks.contest.trial import key
from benchmarks.product_lines import PLACE, ProductLine, extract_features, image_auroc, product_lines, trained
from benchmarks.report import Claim, at_least, publish
from pipelines.lines import read_params
from pipelines.search_space import SyntheticDefects, TuneParams, nested
from pipelines.validation import Validation, judged_features
from wtflow.artefact import read_json, write_json
from wtflow.params import merged
from wtflow.training import TrainParams

KEPT = PLACE / "tune_objective"
SEEDS = (0, 1, 2)
CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"epochs": 2},
    {"learning_rate": 0.0002},
    {"learning_rate": 0.008},
    {"fusion.norm": "channel"},
    {"fusion.norm": "layer"},
    {"fusion.components": 64},
    {"solver.start": 0.0},
    {"solver.start": 0.25},
    {"score.top_fraction": 0.2},
    {"score.balance": "none"},
    {"velocity.width": 16},
)
"""The line's settings with some changed: better ones and clearly worse ones."""
LEAST = 0.5


def main() -> None:
    """Measure what is missing and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m benchmarks.tune_objective --seeds 1"
    )
    parser.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), default=len(SEEDS))
    seeds = SEEDS[: parser.parse_args().seeds]
    objective = TuneParams.parse(read_params()["tune"], "params.yaml: tune").objective
    assert isinstance(objective, SyntheticDefects), "params.yaml: tune.objective.kind: this measures the synthetic one"
    rows: list[dict[str, Any]] = []
    for line in product_lines():
        extract_features(line)
        rows += measured(line, objective, CONFIGURATIONS, seeds)
        publish("tune_objective", [*rows, *correlations(rows)], claims(rows))


def measured(
    line: ProductLine, objective: SyntheticDefects, configurations: tuple[dict[str, Any], ...], seeds: tuple[int, ...]
) -> list[dict[str, Any]]:
    """A row a configuration: means over the seeds of what both measures say."""
    judged = judged_features(line.name, objective, PLACE / "tune", line.place, line.raw)
    validation = Validation.open(line.features("fit"), judged, objective)
    rows = []
    for changes in configurations:
        found = [_figures(line, validation, objective, changes, seed) for seed in seeds]
        names = list(dict.fromkeys(name for one in found for name in one))
        means = {name: float(np.mean([one[name] for one in found])) for name in names}
        shown = ", ".join(f"{key} {value}" for key, value in changes.items()) or "as in params.yaml"
        rows.append({"line": line.name, "configuration": shown, "seeds": len(seeds), **means})
        Console().print(str(rows[-1]), highlight=False, markup=False)
    return rows


def correlations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spearman's rho between each criterion and the test AUROC, a row a line."""
    found = []
    for line in dict.fromkeys(row["line"] for row in rows):
        own = [row for row in rows if row["line"] == line]
        names = [name for name in own[0] if name == "score" or name.startswith("auroc/")]
        tested = [row["test_auroc"] for row in own]
        rho = {name: float(spearmanr([row[name] for row in own], tested).statistic) for name in names}
        found.append({"line": line, "configuration": "rank correlation with test_auroc", **rho})
    return found


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """One a line."""
    return [
        at_least(f"{row['line']}: rank correlation of the search's measure with test AUROC", row["score"], LEAST)
        for row in correlations(rows)
    ]


def kept(
    line: ProductLine, validation: Validation, objective: SyntheticDefects, changes: dict[str, Any], seed: int
) -> Path:
    """Where the figures of a configuration are, once they are measured."""
    method = preset("default", nested(changes), line)
    judged = {"objective": objective.model_dump(mode="json"), "fit": validation.fit.digest}
    code = ["pipelines/validation.py", "wtflow/data/synthetic.py", "wtflow/scoring/metrics.py"]
    method = replace(method, settings={**method.settings, **judged}, code=[*method.code, *code])
    return KEPT / f"{line.name}-{key(method, line, seed)[:12]}.json"


def _figures(
    line: ProductLine, validation: Validation, objective: SyntheticDefects, changes: dict[str, Any], seed: int
) -> dict[str, float]:
    base = line.train_params.model_dump(mode="json")
    params = TrainParams.parse(merged(base, {**nested(changes), "seed": seed}), "a configuration")
    path = kept(line, validation, objective, changes, seed)
    if not path.exists():
        scorer = trained(validation.fit, params)
        write_json(path, {**validation.criterion(scorer), "test_auroc": image_auroc(scorer, line.shards("test"))})
    found: dict[str, float] = read_json(path)
    return found


if __name__ == "__main__":
    main()
