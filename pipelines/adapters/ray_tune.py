"""The search under Ray Tune: ASHA stops trials that are behind, Optuna draws the next ones.

A search has a folder of its own, whose name is made of everything that decides what it does. Ray notes there what was
tried; the same search started again goes on from that note, each unfinished trial behind its last epoch.
"""

import copy
import logging
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from pipelines.adapters.ray_runtime import cluster
from pipelines.adapters.search_tracking import SearchRun
from pipelines.lock import alone
from pipelines.search_space import Choice, FloatRange, IntRange, Plain, TuneParams, nested
from pipelines.validation import Validation
from wtflow.artefact import read_json, replacing, sha256_file, write_json
from wtflow.errors import DigestError, WTFlowError
from wtflow.features.links import link
from wtflow.params import merged
from wtflow.training import Epoch, TrainingState, TrainParams, be_deterministic, finish, start, train

NOTED_EVERY_S = 2
RESTARTS = 2
SCORE = "score"
CHECKPOINT = re.compile(r"checkpoint_(\d{6})")
UNDER_WAY = "is under way in another process. Wait for its end, or stop it; then the same command goes on."
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A configuration that was tried."""

    name: str
    values: dict[str, Plain]
    """By key of `train`."""
    epochs: int
    """That a whole training of these settings has."""
    curve: list[dict[str, float]]
    """An epoch each: `epoch` (from 0), `loss`, `learning_rate`, `score`, `auroc/<kind>`."""
    failure: str | None

    @property
    def score(self) -> float | None:
        """The criterion behind the last epoch that was trained."""
        return self.curve[-1][SCORE] if self.curve else None

    @property
    def whole(self) -> bool:
        """Trained to the end: only then is it a candidate for the best."""
        return self.failure is None and len(self.curve) == self.epochs


@dataclass(frozen=True)
class Search:
    """What every trial of a search has in common."""

    name: str
    features: Path
    judged: Path
    digests: list[str]
    """Of both features: trials that find others would not be comparable."""
    base: Mapping[str, Any]
    """Section `train` of the line."""
    params: TuneParams

    def tried(self, drawn: Mapping[str, Any]) -> dict[str, Plain]:
        """What is tried for what was drawn; the settings as they stand are tried to all their digits."""
        current = self.params.current(self.base)
        return current if current is not None and dict(drawn) == current else self.params.values(drawn)

    def opened(self) -> Validation:
        """What trials train on and are judged by. Raises `WTFlowError` if it is not what the search began with."""
        found = Validation.open(self.features, self.judged, self.params.objective, verify=False)
        for folder, digest, wanted in zip((self.features, self.judged), found.digests, self.digests, strict=True):
            if digest != wanted:
                raise WTFlowError(f"{folder / 'index.json'}: not the features that the search began with.")
        return found

    def settings(self, values: Mapping[str, Plain]) -> TrainParams:
        """Those of one trial."""
        return TrainParams.parse(merged(self.base, nested(values)), "train, in a trial")

    @property
    def epochs(self) -> int:
        """Of the longest trial there can be."""
        domain = self.params.space.get("epochs")
        return int(self.base["epochs"]) if domain is None else max(int(str(end)) for end in domain.ends())

    def packed(self) -> dict[str, Any]:
        """As plain values, for another process."""
        paths = {"features": str(self.features.resolve()), "judged": str(self.judged.resolve())}
        settings = {"base": dict(self.base), "params": self.params.model_dump(mode="json")}
        return {"name": self.name, **paths, "digests": list(self.digests), **settings}

    @classmethod
    def unpacked(cls, values: Mapping[str, Any]) -> "Search":
        """What `packed` packed."""
        features, judged = Path(values["features"]), Path(values["judged"])
        params = TuneParams.parse(values["params"], "tune")
        return cls(values["name"], features, judged, values["digests"], values["base"], params)


def run(search: Search, folder: Path, cores: int, tracked: SearchRun) -> list[Trial]:
    """All trials of the search, which is begun, continued, or only read when it had ended.

    Raises `WTFlowError` for one that Ctrl-C cut off, or whose features changed under it; both go on as if killed.
    """
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(NOTED_EVERY_S))
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # with its own, Ray takes Ctrl-C for the end of a search
    path, at_once = folder / search.name, trials_at_once(search.params.concurrency, cores)
    trainable = tune.with_resources(_trial, {"CPU": 1})
    with alone(path.with_name(f"{path.name}.lock"), f"search {path.name} {UNDER_WAY}"), cluster(at_once):
        if put_back(path):
            fill_gaps(path)
            tuner = tune.Tuner.restore(str(path), trainable, resume_unfinished=True, resume_errored=True)
        else:
            shutil.rmtree(path, ignore_errors=True)  # of a driver that was killed before it tried anything
            tuner = _tuner(search, folder, at_once, trainable, tracked)
        try:
            results = tuner.fit()
        except KeyboardInterrupt:
            raise WTFlowError(f"search {search.name} was cut off. The same command goes on with it.") from None
        told = [_result(search, result) for result in results if result.config]
    if results.errors and not any(trial.whole for trial in told):
        raise WTFlowError(
            f"search {search.name}: {results.num_errors} trials failed, first: {results.errors[0]}\n"
            f"Mend the cause and type the same command to go on; {path} keeps what was tried."
        )
    return told


def trials_at_once(wanted: int, cores: int) -> int:
    """A Ray that is started here has `cores` CPUs; a cluster has CPUs of its own, for which Ray waits."""
    return min(wanted, cores) if (os.environ.get("RAY_ADDRESS") or "local") == "local" else wanted


def put_back(path: Path) -> bool:
    """Ray's state of the search in `path` as `Note` kept it last; whether there was any. What a driver left there that
    was killed while Ray wrote may be half a file."""
    note = path / Note.NAME
    if not note.exists():
        return False
    for left in path.iterdir():
        if left.is_file() and left.name not in (Note.NAME, Deadline.NAME, "tuner.pkl"):
            left.unlink()
    shutil.unpack_archive(note, path)
    return True


def fill_gaps(path: Path) -> None:
    """Ray's last note of a search in `path` may name a checkpoint that a newer one has replaced before the driver was
    killed, and Ray then gives the trial up. Where checkpoints of a trial are missing, or were half copied, its newest
    whole one stands in for them: a state knows by itself which epochs are behind it."""
    for trial in (folder for folder in path.iterdir() if folder.is_dir()):
        found = {int(name[1]): one for one in trial.iterdir() if (name := CHECKPOINT.fullmatch(one.name))}
        whole = [number for number, one in found.items() if _has_its_curve(one)]
        for number in range(max(found, default=-1) + 1) if whole else ():
            if number not in whole:
                with replacing(trial / f"checkpoint_{number:06d}") as draft:
                    shutil.copytree(found[max(whole)], draft, copy_function=_linked)


def _linked(source: str, target: str) -> None:
    link(Path(source), Path(target))


def _has_its_curve(checkpoint: Path) -> bool:
    try:
        curve_of(checkpoint)
    except WTFlowError:
        return False
    return True


def curve_of(checkpoint: Path) -> list[dict[str, float]]:
    """The curve of the epochs behind a trial's checkpoint. Raises `DigestError` unless all of it is whole."""
    try:
        curve: list[dict[str, float]] = read_json(checkpoint / "curve.json")
        state = read_json(checkpoint / "state.json")
        changed = [name for name, digest in state["files"].items() if sha256_file(checkpoint / name) != digest]
        is_whole = not changed and len(curve) == len(state["history"])
    except (WTFlowError, OSError, KeyError, TypeError, AttributeError) as error:
        raise DigestError(f"{checkpoint}: this checkpoint is damaged ({error})") from error
    if not is_whole:
        raise DigestError(f"{checkpoint}: this checkpoint is damaged: its files are not of one epoch")
    return curve


def _tuner(search: Search, folder: Path, at_once: int, trainable: Any, tracked: SearchRun) -> Any:
    params, halving = search.params, search.params.halving
    current = params.current(search.base)
    minutes = params.budget.minutes
    path = (folder / search.name).resolve()
    return tune.Tuner(
        trainable,
        param_space={"search": search.packed(), "values": {key: _domain(one) for key, one in params.space.items()}},
        tune_config=tune.TuneConfig(
            metric=SCORE,
            mode="max",
            num_samples=params.budget.trials or -1,
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_dirname_creator=_folder_name,
            search_alg=OptunaSearch(
                seed=params.seed,
                points_to_evaluate=[{f"values/{key}": value for key, value in current.items()}] if current else None,
            ),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=search.epochs,
                grace_period=min(halving.grace_epochs, search.epochs),
                reduction_factor=halving.reduction,
            ),
        ),
        run_config=tune.RunConfig(
            name=search.name,
            storage_path=str(folder.resolve()),
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            callbacks=[Watch(search, tracked), Note(str(path))],
            stop=None if minutes is None else Deadline(str(path), 60 * minutes),
            verbose=0,
        ),
    )


def _domain(one: FloatRange | IntRange | Choice) -> Any:
    if isinstance(one, Choice):
        return tune.choice(list(one.values))
    if isinstance(one, IntRange):
        return (tune.lograndint if one.log else tune.randint)(one.low, one.high + 1)
    return (tune.loguniform if one.log else tune.uniform)(one.low, one.high)


def _trial(config: dict[str, Any]) -> None:
    """What a worker runs: the plain loop on one thread, the criterion behind every epoch."""
    torch.set_num_threads(1)
    be_deterministic()
    search, curve = Search.unpacked(config["search"]), []
    try:
        judged = search.opened()
    except (WTFlowError, OSError) as error:  # no fault of these settings: `Note` ends the search
        tune.report({"epoch": 1, SCORE: 0.0, "curve": [], "ends": str(error)})
        return

    def on_epoch(state: TrainingState, epoch: Epoch) -> None:
        trained = TrainingState(copy.deepcopy(state.scorer), state.params, state.history)
        curve.append({**asdict(epoch), **judged.criterion(finish(trained, judged.fit))})
        with tempfile.TemporaryDirectory() as folder:
            state.save(Path(folder))
            write_json(Path(folder, "curve.json"), curve)
            _report(curve, tune.Checkpoint.from_directory(folder))

    try:
        params = search.settings(search.tried(config["values"]))
        state = start(judged.fit, params)
        curve += _continued(state)
        if len(curve) == params.epochs:  # killed behind its last epoch, which Ray may not have noted
            _report(curve)
        train(state, judged.fit, params, on_epoch=on_epoch)
    except WTFlowError as error:  # these settings cannot be trained: the lowest score, so that others are drawn
        tune.report({"epoch": len(curve) + 1, SCORE: 0.0, "curve": curve, "failure": str(error)})


def _report(curve: list[dict[str, float]], checkpoint: Any = None) -> None:
    tune.report({"epoch": len(curve), SCORE: curve[-1][SCORE], "curve": curve, "failure": None}, checkpoint=checkpoint)


def _continued(state: TrainingState) -> list[dict[str, float]]:
    """The curve of the epochs behind the trial's checkpoint, which `state` then continues."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        try:
            curve = curve_of(Path(folder))
            state.load(Path(folder))
        except DigestError as error:
            logger.warning("%s; this trial starts from the first epoch, with the same result", error)
            return []
    return curve


def _result(search: Search, result: Any) -> Trial:
    metrics, began = result.metrics or {}, Search.unpacked(result.config["search"])
    values = began.tried(result.config["values"])
    epochs = int(str(values.get("epochs", search.base["epochs"])))
    failure = metrics.get("failure") or (str(result.error) if result.error else None)
    name = str(metrics.get("trial_id") or Path(result.path).name)
    return Trial(name, values, epochs, metrics.get("curve", []), failure)


def _folder_name(trial: Any) -> str:
    return str(trial.trial_id)


class Watch(tune.Callback):  # type: ignore[misc]
    """Tells MLflow and the terminal what the trials come to. Ray keeps a copy of it in the search's folder."""

    def __init__(self, search: Search, tracked: SearchRun) -> None:
        self.packed, self.tracked = search.packed(), tracked

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """The epoch's figures."""
        if result.get("curve"):
            self.tracked.log(trial.trial_id, self._values(trial), result["curve"][-1])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """One that was trained to the end or stopped."""
        result = trial.last_result
        if result.get("ends"):
            return
        self.tracked.end(trial.trial_id, "FAILED" if result.get("failure") else "FINISHED")
        ended = sum(one.is_finished() or one is trial for one in trials)
        shown = ", ".join(f"{key} {value}" for key, value in self._values(trial).items())
        self.tracked.say(
            f"trial {ended}: {result.get(SCORE, 0.0):.4f} after {len(result.get('curve', []))} epochs; {shown}"
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """One whose process died too often."""
        self.tracked.end(trial.trial_id, "FAILED")

    def _values(self, trial: Any) -> dict[str, Plain]:
        return Search.unpacked(self.packed).tried(trial.config["values"])


class Note(tune.Callback):  # type: ignore[misc]
    """Keeps the newest whole state of a search within its folder, in one file that is replaced in one step. Ray writes
    its files there one behind the other and in place; beforehand, it makes them ready elsewhere.

    Ends a search one of whose trials found other features, without a note of that trial: it is tried again."""

    NAME = "note.zip"

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._kept = 0
        self._ends: str | None = None

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """One that ends the search, perhaps; Ray would take an error here for the trial's."""
        self._ends = self._ends or result.get("ends")

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Behind Ray's own note, if there is a new one."""
        if self._ends:
            raise WTFlowError(
                f"search {Path(self.folder).name}: {self._ends} To go on, bring them back (dvc checkout) and type the "
                "same command; with new ones it is another search."
            )
        if not trials:
            return
        staged = Path(trials[0].storage.experiment_driver_staging_path)
        newest = max((file.stat().st_mtime_ns for file in staged.glob("experiment_state-*")), default=0)
        if newest > self._kept:
            self._kept = newest
            with replacing(Path(self.folder, self.NAME)) as draft, zipfile.ZipFile(draft, "w") as archive:
                for file in staged.iterdir():
                    if file.is_file():
                        archive.write(file, file.name)

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        """Behind the last one."""
        if not self._ends:
            self.on_step_end(0, trials)


class Deadline(tune.Stopper):  # type: ignore[misc]
    """Ends the search after so many seconds of work, kills not counted."""

    NAME = "spent.json"

    def __init__(self, folder: str, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._last: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial ends on its own account."""
        return False

    def stop_all(self) -> bool:
        """Asked again and again while the search runs."""
        now, note = time.monotonic(), Path(self.folder, self.NAME)
        spent = read_json(note)["seconds"] if note.exists() else 0.0
        since = 0.0 if self._last is None else now - self._last
        if self._last is None or since > NOTED_EVERY_S or spent + since >= self.seconds:
            self._last = now
            write_json(note, {"seconds": spent + since})
        return bool(spent + since >= self.seconds)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}
