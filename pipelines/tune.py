"""Search settings of `train` for a product line, by the section `tune` of params.yaml: Ray Tune with ASHA and Optuna.

No image of the test split and no real defect takes part: the measure is how well damaged copies of normal images are
told from these images. Killed or cut off, the same command goes on; a search that has ended is shown again.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console

from pipelines import preset
from pipelines.command import call, parser
from pipelines.environment import RunSettings
from pipelines.lines import PARAMS_FILE, known_line, line_params, read_params
from pipelines.search_space import Plain, TuneParams, nested
from pipelines.validation import judged_features
from wtflow.artefact import digest_of, sha256_file
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.params import merged
from wtflow.training import TrainParams

EXAMPLES = """examples:
  python -m pipelines.tune solar-mono             search; print the trials and the best of them
  python -m pipelines.tune solar-mono --apply     the same, and write the best into params.yaml; then: dvc repro
  WTFLOW_WORK=/scratch python -m pipelines.tune solar-mono      keep trials and features of the search elsewhere"""


def main(line: str, apply: bool) -> None:
    """Search, or go on with it; print what it came to."""
    from pipelines.adapters import ray_tune
    from pipelines.adapters.search_tracking import SearchRun
    from pipelines.search_report import pictures, ranked, table

    settings = RunSettings()
    torch.set_num_threads(settings.cores())
    params = tune_params(line)
    base = line_params(line, "train", TrainParams).model_dump(mode="json")
    params.check(base, f"{PARAMS_FILE}: tune")
    folder = (settings.work / "tune").resolve()
    judged = judged_features(line, params.objective, folder)
    search = ray_tune.Search(search_name(line, params, base, judged), _features(line), judged, base, params)
    tracked = SearchRun(line, search.name)
    tracked.begin({"train": base, "tune": params.model_dump(mode="json")})
    trials = ray_tune.run(search, folder, len(os.sched_getaffinity(0)), tracked)
    best = ranked(trials)[0] if trials else None
    if best is None or not best.whole:
        raise WTFlowError(
            f"tune {line}: no trial of {len(trials)} was trained to the end. Raise tune.budget of {PARAMS_FILE}; the "
            f"trials are in {folder / search.name}."
        )
    shown = pictures(trials, params, folder / f"{search.name}.pictures")
    figures = {"best_score": best.score or 0.0, "trials": float(len(trials))}
    tracked.finish(figures, {"best_trial": best.name}, shown, [trial.name for trial in trials])
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(trials, params, params.current(base)))
    changes = {key: value for key, value in best.values.items() if value != preset.at(base, tuple(key.split(".")))}
    _conclude(line, changes, apply, folder / search.name)


def tune_params(line: str) -> TuneParams:
    """The section `tune`, for a line that there is."""
    values = read_params()
    known_line(values, line)
    return TuneParams.parse(values.get("tune") or {}, f"{PARAMS_FILE}: tune")


def search_name(line: str, params: TuneParams, base: dict[str, object], judged: Path) -> str:
    """Two searches of one name would do the same: settings, features and code are in it."""
    facts = [FeatureShards.open(folder, verify=False).digest for folder in (_features(line), judged)]
    root = Path(__file__).parents[1]
    code = [*sorted((root / "wtflow").rglob("*.py")), Path(__file__).with_name("validation.py")]
    code.append(Path(__file__).parent / "adapters/ray_tune.py")
    return (
        f"{line}-{digest_of([params.model_dump(mode='json'), base, facts, [sha256_file(path) for path in code]])[:12]}"
    )


def _features(line: str) -> Path:
    return Path(f"data/features/{line}/fit")


def _conclude(line: str, changes: Mapping[str, Plain], apply: bool, kept: Path) -> None:
    if not changes:
        preset.say(f"The settings of {line} as they stand are the best that were tried: nothing to change.")
        return
    before = read_params()
    sections = {stage: values or {} for stage, values in before["lines"][line].items()}
    wanted = {**sections, "train": merged(sections["train"], nested(changes))}
    preset.check(before, line, wanted)
    text = ", ".join(f"{key}: {value}" for key, value in changes.items())
    if apply:
        preset.write(line, wanted)
        preset.say(f"lines.{line}.train of {PARAMS_FILE} now has {text}.", f"Next: dvc repro register@{line}")
    else:
        preset.say(
            f"Best for {line}: {text}",
            f"Write it to {PARAMS_FILE}: python -m pipelines.tune {line} --apply",
            f"Search anew: remove {kept}",
        )


if __name__ == "__main__":
    options = parser("pipelines.tune", __doc__, EXAMPLES)
    options.add_argument("line", metavar="LINE", help="a product line: a key of `lines` in params.yaml")
    options.add_argument(
        "--apply", action="store_true", help="write the best settings as the line's own in params.yaml"
    )
    arguments = options.parse_args()
    call(lambda: main(arguments.line, arguments.apply))
