import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pipelines import kept_field, train
from pipelines.adapters import ray_train
from pipelines.adapters.ray_fleet import fit_here
from pipelines.environment import RunSettings
from pipelines.lines import line_params
from pipelines.train import Trained, train_line
from tests import tiny_line
from tests.pipelines.searches import write_project
from wtflow.bundle import load_bundle, write_bundle
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.params import merged
from wtflow.training import Epoch, TrainingState, TrainParams

ROOT = Path(__file__).parents[2]


def not_called(*_: object) -> NoReturn:
    raise AssertionError("it was trained")


def test_a_rate_that_the_calibration_images_cannot_hold_is_refused_before_training(
    tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(tiny_features, tmp_path)
    monkeypatch.chdir(tmp_path)
    params = line_params(tiny_line.LINE, "train", TrainParams)
    strict = params.model_copy(update={"calibration": params.calibration.model_copy(update={"target_fpr": 0.001})})
    with pytest.raises(WTFlowError, match=r"train\.calibration\.target_fpr: 0\.001 needs at least 999 calibration"):
        train_line(tiny_line.LINE, strict, RunSettings(), not_called, lambda epoch: None)


class Trainer:
    """Trains with the plain loop, and counts."""

    def __init__(self) -> None:
        self.trained = 0

    def __call__(self, *what: Any) -> TrainingState:
        self.trained += 1
        return fit_here(*what)


@pytest.fixture
def place(tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the features of `tiny`, in which commands run."""
    write_project(tiny_features, tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for package in ("pipelines", "wtflow"):
        (tmp_path / package).symlink_to(ROOT / package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def settled(**changes: Any) -> TrainParams:
    """The settings of `tiny` with others laid over them."""
    values = line_params(tiny_line.LINE, "train", TrainParams).model_dump(mode="json")
    return TrainParams.parse(merged(values, changes), "test")


def trained(params: TrainParams, fit: Trainer, epochs: list[Epoch] | None = None) -> Trained:
    return train_line(tiny_line.LINE, params, RunSettings(), fit, (epochs if epochs is not None else []).append)


ASKED_ANEW: list[dict[str, Any]] = [
    {"calibration": {"target_fpr": 0.4}},
    {"score": {"balance": "none", "top_fraction": 0.3}},
    {"solver": {"start": 0.25}},
]


@pytest.mark.parametrize("changes", ASKED_ANEW, ids=lambda changes: next(iter(changes)))
def test_a_kept_field_under_other_settings_gives_the_bundle_of_a_training(place: Path, changes: dict[str, Any]) -> None:
    fit, told, again = Trainer(), list[Epoch](), list[Epoch]()
    first = trained(settled(), fit, told)
    curve = (place / "plots/tiny.csv").read_bytes()
    kept = trained(settled(**changes), fit, again)
    assert (first.was_kept, kept.was_kept, fit.trained) == (False, True, 1)
    assert again == told
    assert (place / "plots/tiny.csv").read_bytes() == curve
    shutil.rmtree(place / ".wtflow/fields")
    anew = trained(settled(**changes), fit)
    assert (anew.was_kept, fit.trained) == (False, 2)
    assert kept.digest == anew.digest != first.digest


def test_a_field_that_other_settings_or_features_decide_is_trained(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Trainer()
    trained(settled(), fit)
    assert not trained(settled(seed=1), fit).was_kept
    assert not trained(settled(), fit).was_kept, "the last one only is kept"
    monkeypatch.setattr(FeatureShards, "digest", "other features")
    assert not trained(settled(), fit).was_kept
    assert fit.trained == 4


def test_other_libraries_train_anew_and_continue_no_checkpoint(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Trainer()
    first = trained(settled(), fit)
    for module in (kept_field, train):
        monkeypatch.setattr(module, "library_versions", lambda: {"torch": "99"})
    again = trained(settled(), fit)
    assert (again.was_kept, fit.trained) == (False, 2)
    assert again.name != first.name


def test_the_number_of_workers_is_a_fields_own_where_each_normalises_its_share(tiny_fit: FeatureShards) -> None:
    def digests(**velocity: str) -> int:
        values = merged(tiny_line.TRAIN, {"batches": {"kind": "images"}, "velocity": velocity})
        params = TrainParams.parse(values, "test")
        return len({kept_field.field_digest(params, tiny_fit, {}, workers) for workers in (1, 2)})

    assert digests(kind="unet", norm="batch") == 2
    assert digests(kind="unet", norm="group") == digests(kind="location", norm="batch") == 1


def test_a_line_that_another_process_trains_is_named_and_left_alone(place: Path) -> None:
    lock = place / ".wtflow/locks/train-tiny.lock"
    code = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True)"
    )
    lock.parent.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}; input()", lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(WTFlowError, match=r"train-tiny\.lock: another process trains tiny\. Wait"):
            trained(settled(), Trainer())
        assert not (place / "models").exists()
        other.communicate("\n")
    assert not trained(settled(), Trainer()).was_kept


def test_a_file_system_without_locks_trains_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert not trained(settled(), Trainer()).was_kept
    assert "not locked (No locks available)" in caplog.text


def test_the_field_of_a_bundle_that_took_the_place_of_this_one_is_not_kept(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Trainer()
    trained(settled(), fit)
    kept = (place / ".wtflow/fields/tiny/field.json").read_bytes()
    shutil.copytree(place / "models/tiny", place / "other")

    def replaced(*what: Any) -> str:
        digest = write_bundle(*what)
        shutil.rmtree(place / "models/tiny")
        shutil.copytree(place / "other", place / "models/tiny")
        return digest

    monkeypatch.setattr(train, "write_bundle", replaced)
    assert not trained(settled(seed=1), fit).was_kept
    assert "models/tiny was replaced meanwhile" in caplog.text
    assert (place / ".wtflow/fields/tiny/field.json").read_bytes() == kept


@pytest.mark.parametrize("file", ["scorer.safetensors", "field.json"])
def test_a_damaged_field_is_trained_anew(place: Path, caplog: pytest.LogCaptureFixture, file: str) -> None:
    fit = Trainer()
    digest = trained(settled(), fit).digest
    damaged = place / ".wtflow/fields/tiny" / file
    data = damaged.read_bytes()
    damaged.unlink()  # it may share its bytes with the bundle
    damaged.write_bytes(data[:-9])
    done = trained(settled(), fit)
    assert (done.was_kept, done.digest) == (False, digest)
    assert f".wtflow/fields/{tiny_line.LINE}: damaged" in caplog.text
    assert trained(settled(), fit).was_kept


def test_a_field_that_cannot_be_kept_costs_no_bundle(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    (place / ".wtflow").mkdir()
    (place / ".wtflow/fields").write_text("a file in the way")
    fit = Trainer()
    done = trained(settled(), fit)
    assert load_bundle(place / "models/tiny").digest == done.digest
    assert "not kept" in caplog.text
    assert not trained(settled(), fit).was_kept


def test_checkpoints_that_a_kill_left_are_removed_with_the_kept_field(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Trainer()
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(ray_train, "forget", interrupted)
        trained(settled(), fit)
    assert len(list((place / ".wtflow/train").iterdir())) == 1
    assert trained(settled(), fit).was_kept
    assert list((place / ".wtflow/train").iterdir()) == []


def interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt
