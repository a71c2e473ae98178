"""What a search came to: a table for the terminal, and pictures of it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from pipelines.adapters.ray_tune import Trial
from pipelines.search_space import Choice, FloatRange, IntRange, Plain, TuneParams
from wtflow.artefact import replacing

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

WHOLE, STOPPED = "#33658a", "#b7791f"


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Best first: whole trials by their score, then the others by epochs and score."""

    def rank(trial: Trial) -> tuple[bool, int, float]:
        return (trial.whole, 0 if trial.whole else len(trial.curve), trial.score or 0.0)

    return sorted(trials, key=rank, reverse=True)


def table(trials: Sequence[Trial], params: TuneParams, current: Mapping[str, Plain] | None) -> Table:
    """A row a trial, the best one first."""
    shown = Table(title="trials, best first; only those trained to the end are candidates")
    for column in ("trial", *params.space, "epochs", "score", "note"):
        shown.add_column(column, overflow="fold")
    for trial in ranked(trials):
        notes = ["as in params.yaml"] if trial.values == current else []
        notes += [cause(trial.failure)] if trial.failure else [] if trial.whole else ["stopped"]
        score = "-" if trial.score is None else f"{trial.score:.4f}"
        values = (str(trial.values[key]) for key in params.space)
        shown.add_row(trial.name, *values, f"{len(trial.curve)}/{trial.epochs}", score, ", ".join(notes))
    return shown


def cause(failure: str) -> str:
    """The line that tells it: the first, or the last of a traceback that Ray reports."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", failure).strip().splitlines()
    return lines[-1] if lines[0].startswith("ray::") else lines[0]


def pictures(trials: Sequence[Trial], params: TuneParams, folder: Path) -> dict[str, Path]:
    """Write history.png, parallel.png and importance.png; the last is missing where there is too little to say."""
    made = {"history": _history(trials), "parallel": _parallel(trials, params)}
    found = importance(trials, params)
    if found:
        made["importance"] = _importance(found)
    paths = {}
    for name, figure in made.items():
        paths[name] = folder / f"{name}.png"
        with replacing(paths[name]) as draft:
            figure.savefig(draft, format="png", dpi=110)
    return paths


def importance(trials: Sequence[Trial], params: TuneParams) -> dict[str, float]:
    """Share of each key in what tells good trials from the others, by Optuna's PED-ANOVA.

    A stopped trial has no final score, so it is left out; {} for fewer than 4 others.
    """
    import optuna

    whole = [trial for trial in trials if trial.whole and trial.score is not None]
    if len(whole) < 4 or len({trial.score for trial in whole}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    spread = {key: _distribution(key, params) for key in params.space}
    for trial in whole:
        study.add_trial(optuna.trial.create_trial(params=dict(trial.values), distributions=spread, value=trial.score))
    return {key: float(value) for key, value in optuna.importance.get_param_importances(study).items()}


def _distribution(key: str, params: TuneParams) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    domain = params.space[key]
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.values)
    kind = FloatDistribution if domain.type == "float" else IntDistribution
    return kind(domain.low, domain.high, log=domain.log)  # type: ignore[arg-type]


def _history(trials: Sequence[Trial]) -> Figure:
    figure, axes = _empty()
    for number, trial in enumerate(trials, start=1):
        if trial.score is not None:
            axes.plot(number, trial.score, "o" if trial.whole else "x", color=WHOLE if trial.whole else STOPPED)
    best = np.fmax.accumulate([trial.score if trial.whole and trial.score else np.nan for trial in trials] or [np.nan])
    axes.step(range(1, len(best) + 1), best, where="post", color=WHOLE, linewidth=1)
    axes.set_xlabel("trial (x: stopped early; line: best so far)")
    axes.set_ylabel("score")
    return figure


def _parallel(trials: Sequence[Trial], params: TuneParams) -> Figure:
    """A vertical axis a key, from its low to its high, and one for the rank of the score; a line a trial, darker and
    wider for a higher one."""
    figure, axes = _empty()
    scored = [trial for trial in trials if trial.score is not None]
    scores = np.array([trial.score for trial in scored], dtype=np.float64)
    order = scores.argsort().argsort() / max(1, len(scores) - 1) if len(scores) else scores
    for trial, place in zip(scored, order, strict=True):
        heights = [*(_height(trial, key, params) for key in params.space), float(place)]
        axes.plot(heights, color=str(0.85 * (1 - place)), linewidth=1 + place)
    marks = {key: _marks(domain) for key, domain in params.space.items()}
    marks["score, by rank"] = [f"{scores.min():.4f}", f"{scores.max():.4f}"] if len(scores) else []
    for x, texts in enumerate(marks.values()):
        axes.axvline(x, color="#999999", linewidth=0.8, zorder=0)
        for height, text in zip(np.linspace(0, 1, len(texts)), texts, strict=True):
            axes.annotate(
                text, (x, height), (4, 0), textcoords="offset points", va="center", fontsize=8, color=WHOLE,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )  # fmt: skip
    axes.set_xlim(-0.2, len(marks) - 0.4)
    axes.set_xticks(range(len(marks)), list(marks), rotation=20, ha="right")
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return figure


def _marks(domain: FloatRange | IntRange | Choice) -> list[str]:
    """What is written along a key's axis, from its foot to its head."""
    if isinstance(domain, Choice):
        return [str(value) for value in domain.values]
    middle = float(np.sqrt(domain.low * domain.high)) if domain.log else (domain.low + domain.high) / 2
    return [f"{value:.3g}" for value in (domain.low, middle, domain.high)]


def _height(trial: Trial, key: str, params: TuneParams) -> float:
    domain, value = params.space[key], trial.values[key]
    if isinstance(domain, Choice):
        return domain.values.index(value) / (len(domain.values) - 1)
    ends: NDArray[np.float64] = np.array([domain.low, float(str(value)), domain.high])
    low, middle, high = np.log(ends) if domain.log else ends
    return float((middle - low) / (high - low))


def _importance(found: dict[str, float]) -> Figure:
    figure, axes = _empty()
    axes.barh(list(found)[::-1], list(found.values())[::-1], color=WHOLE)
    axes.set_xlabel("share of importance")
    return figure


def _empty() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    return figure, figure.subplots()
