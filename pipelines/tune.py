"""Search settings of `train` for a product line, by the section `tune` of params.yaml: Ray Tune with ASHA and Optuna.

No image of the test split and no real defect takes part: the measure is how well damaged copies of normal images are
told from these images. Killed or cut off, the same command goes on; a search that has ended is shown again.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from pipelines import preset
from pipelines.command import call, parser
from pipelines.environment import RunSettings
from pipelines.lines import PARAMS_FILE, known_line, line_params, read_params
from pipelines.search_space import Plain, TuneParams, nested
from pipelines.validation import Validation, judged_features
from wtflow.artefact import digest_of, sha256_file
from wtflow.errors import WTFlowError
from wtflow.params import merged
from wtflow.training import TrainParams

if TYPE_CHECKING:
    from pipelines.adapters.ray_tune import Trial

EXAMPLES = """examples:
  python -m pipelines.tune solar-mono             search; print the trials and the best of them
  python -m pipelines.tune solar-mono --apply     the same, and write the best into params.yaml; then: dvc repro
  WTFLOW_WORK=/scratch python -m pipelines.tune solar-mono      keep trials and features of the search elsewhere"""


def main(line: str, apply: bool) -> None:
    """Search, or go on with it; print what it came to."""
    from pipelines.adapters import ray_tune
    from pipelines.adapters.search_tracking import SearchRun
    from pipelines.search_report import pictures, table

    settings = RunSettings()
    torch.set_num_threads(settings.cores())
    params = tune_params(line)
    base = _base(line)
    params.check(base, f"{PARAMS_FILE}: tune")
    folder = (settings.work / "tune").resolve()
    judged = judged_features(line, params.objective, folder)
    features = _features(line)
    digests = Validation.open(features, judged, params.objective, verify=False).digests
    name = search_name(line, params, base, {features: digests[0], judged: digests[1]})
    search = ray_tune.Search(name, features, judged, digests, base, params)
    tracked = SearchRun(line, search.name)
    tracked.begin({"train": base, "tune": params.model_dump(mode="json")})
    trials = ray_tune.run(search, folder, settings.cores(), tracked)
    current, console = params.current(base), Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(trials, params, current))
    best = _best(line, trials, folder / search.name)
    if current is not None and current not in [trial.values for trial in trials]:
        preset.say(f"The settings of {line} were changed since the search began: as they stand, they were not tried.")
    shown = pictures(trials, params, folder / f"{search.name}.pictures")
    figures = {"best_score": best.score or 0.0, "trials": float(len(trials))}
    tracked.finish(figures, {"best_trial": best.name}, shown, [trial.name for trial in trials])
    _conclude(line, base, best.values, apply, folder / search.name)


def tune_params(line: str) -> TuneParams:
    """The section `tune`, for a line that there is."""
    values = read_params()
    known_line(values, line)
    return TuneParams.parse(values.get("tune") or {}, f"{PARAMS_FILE}: tune")


def search_name(line: str, params: TuneParams, base: Mapping[str, Any], features: Mapping[Path, str]) -> str:
    """Two searches of one name would try the same: settings, features (by folder: their digest), code and libraries are
    in it. So are the folders, which Ray notes as they are: one that was moved begins anew.

    The line's own values of what is searched are not, for each trial has others: with the best of them applied, it is
    still this search.
    """
    fixed = merged(base, nested(dict.fromkeys(params.space)))
    facts = {str(folder.resolve()): digest for folder, digest in features.items()}
    here = Path(__file__).parent
    own = [here / name for name in ("validation.py", "search_space.py", "adapters/ray_tune.py")]
    code = [sha256_file(path) for path in [*sorted((here.parent / "wtflow").rglob("*.py")), *own]]
    libraries = [version(name) for name in ("ray", "optuna")]
    return f"{line}-{digest_of([params.model_dump(mode='json'), fixed, facts, code, libraries])[:12]}"


def _base(line: str) -> dict[str, Any]:
    """The line's section `train`, as params.yaml has it now."""
    return line_params(line, "train", TrainParams).model_dump(mode="json")


def _best(line: str, trials: "Sequence[Trial]", kept: Path) -> "Trial":
    """The best trial of those that were trained to the end. Raises `WTFlowError` if none was."""
    from pipelines.search_report import cause, ranked

    if trials and (best := ranked(trials)[0]).whole:
        return best
    failures = [cause(trial.failure) for trial in trials if trial.failure]
    if failures and len(failures) == len(trials):
        raise WTFlowError(
            f"tune {line}: all {len(trials)} trials failed, the first of them: {failures[0]}\n"
            f"Mend tune.space or train of {PARAMS_FILE}, so that such settings are not drawn; the trials are in {kept}."
        )
    raise WTFlowError(
        f"tune {line}: no trial of {len(trials)} was trained to the end. Raise tune.budget of {PARAMS_FILE}; the "
        f"trials are in {kept}." + (f" {len(failures)} failed, the first of them: {failures[0]}" if failures else "")
    )


def _features(line: str) -> Path:
    return Path(f"data/features/{line}/fit")


def _conclude(line: str, base: Mapping[str, Any], best: Mapping[str, Plain], apply: bool, kept: Path) -> None:
    """Say what is best, and write it with `apply`. `base` is what the search began with: a search takes its time, and
    params.yaml may be another one behind it."""
    now = _base(line)
    if merged(now, nested(best)) != merged(base, nested(best)):
        raise WTFlowError(
            f"{PARAMS_FILE}: train (with lines.{line}.train) changed during the search, beyond the keys of tune.space. "
            "Change it back, or type the same command to search with what it has now."
        )
    if all(preset.at(now, tuple(key.split("."))) == value for key, value in best.items()):
        preset.say(f"The settings of {line} as they stand are the best that were tried: nothing to change.")
        return
    before = read_params()
    sections = {stage: values or {} for stage, values in before["lines"][line].items()}
    wanted = {**sections, "train": merged(sections["train"], nested(best))}
    preset.check(before, line, wanted)
    text = ", ".join(f"{key}: {value}" for key, value in best.items())
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
