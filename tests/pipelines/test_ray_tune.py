import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune

from pipelines.adapters import ray_tune
from pipelines.adapters.ray_tune import Note, Search, fill_gaps, put_back, trials_at_once
from pipelines.lock import alone
from pipelines.search_report import cause
from pipelines.search_space import TuneParams
from pipelines.validation import Validation, judged_features
from tests.pipelines.searches import TUNE, write_project
from tests.tiny_line import train_params
from wtflow.artefact import sha256_bytes, write_json
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.training import start, train

FIT = Path("data/features/tiny/fit")


def checkpoint(folder: Path, content: str) -> None:
    """A whole one, as far as its files tell."""
    folder.mkdir(parents=True)
    (folder / "scorer.safetensors").write_text(content)
    files = {"scorer.safetensors": sha256_bytes(content.encode())}
    write_json(folder / "state.json", {"files": files, "history": [{}]})
    write_json(folder / "curve.json", [{}])


def contents(path: Path) -> dict[str, str]:
    return {str(one.parent.relative_to(path)): one.read_text() for one in path.glob("*/*/scorer.safetensors")}


def search_of(params: TuneParams, **base: Any) -> Search:
    return Search("tiny-0", FIT, Path("judged"), ["", ""], train_params(**base).model_dump(mode="json"), params)


def test_the_newest_checkpoint_stands_in_for_those_that_it_replaced(tmp_path: Path) -> None:
    checkpoint(tmp_path / "behind/checkpoint_000001", "second")
    checkpoint(tmp_path / "behind/checkpoint_000003", "fourth")
    checkpoint(tmp_path / "behind/checkpoint_000002.tmp-0123abcd", "half of a copy")
    checkpoint(tmp_path / "first/checkpoint_000000", "first")
    (tmp_path / "begun").mkdir()
    (tmp_path / "tuner.pkl").write_text("")
    fill_gaps(tmp_path)
    assert contents(tmp_path) == {
        "behind/checkpoint_000000": "fourth",
        "behind/checkpoint_000001": "second",
        "behind/checkpoint_000002.tmp-0123abcd": "half of a copy",
        "behind/checkpoint_000002": "fourth",
        "behind/checkpoint_000003": "fourth",
        "first/checkpoint_000000": "first",
    }


@pytest.mark.parametrize("damage", ["state.json", "curve.json", "scorer.safetensors"])
def test_no_half_copied_checkpoint_stands_in_for_another(tmp_path: Path, damage: str) -> None:
    checkpoint(tmp_path / "trial/checkpoint_000001", "whole")
    checkpoint(tmp_path / "trial/checkpoint_000002", "half copied")
    (tmp_path / "trial/checkpoint_000002" / damage).write_text("ha")
    checkpoint(tmp_path / "alone/checkpoint_000001", "half copied")
    (tmp_path / "alone/checkpoint_000001/state.json").unlink()
    fill_gaps(tmp_path)
    assert contents(tmp_path / ".") == {
        **{f"trial/checkpoint_00000{number}": "whole" for number in range(3)},
        "alone/checkpoint_000001": "half copied",
    }


@pytest.fixture
def kept(tiny_fit: FeatureShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint behind an epoch, which Ray has for the trial."""
    state, params = start(tiny_fit, train_params(epochs=1)), train_params(epochs=1)
    train(state, tiny_fit, params)
    state.save(tmp_path / "kept")
    write_json(tmp_path / "kept/curve.json", [{"epoch": 0, "score": 0.5}])

    @contextmanager
    def as_directory() -> Iterator[str]:
        yield str(tmp_path / "kept")

    monkeypatch.setattr(tune, "get_checkpoint", lambda: SimpleNamespace(as_directory=as_directory))
    return tmp_path / "kept"


def test_a_trial_goes_on_behind_its_checkpoint(tiny_fit: FeatureShards, kept: Path) -> None:
    state = start(tiny_fit, train_params())
    assert ray_tune._continued(state) == json.loads((kept / "curve.json").read_text())
    assert len(state.history) == 1


@pytest.mark.parametrize("name", ["curve.json", "state.json", "optimiser.safetensors"])
@pytest.mark.parametrize("text", [None, "", '[{"epoch": 0', "[]"])
def test_a_damaged_checkpoint_is_no_fault_of_the_settings(
    tiny_fit: FeatureShards, kept: Path, name: str, text: str | None
) -> None:
    (kept / name).unlink()
    if text is not None:
        (kept / name).write_text(text)
    state = start(tiny_fit, train_params())
    assert ray_tune._continued(state) == []
    assert state.history == []


def test_settings_that_do_not_go_together_are_a_trial_like_others() -> None:
    space = {
        "calibration.target_fpr": {"type": "float", "low": 0.01, "high": 0.1},
        "calibration.review_fpr": {"type": "choice", "values": [None, 0.08]},
    }
    drawn = {"calibration.target_fpr": 0.09, "calibration.review_fpr": 0.08}
    search = search_of(TuneParams.parse({**TUNE, "space": space}, "tune"))
    with pytest.raises(WTFlowError, match="review_fpr"):
        search.settings(search.tried(drawn))
    metrics = {"trial_id": "first", "curve": [], "failure": "settings are wrong"}
    config = {"search": search.packed(), "values": drawn}
    found = ray_tune._result(search, SimpleNamespace(metrics=metrics, config=config, error=None, path="x"))
    assert (found.values, found.epochs, found.failure) == (drawn, search.base["epochs"], "settings are wrong")
    assert not found.whole


def test_the_settings_as_they_stand_are_tried_to_all_their_digits() -> None:
    params = TuneParams.parse(TUNE, "tune")
    search = search_of(params, learning_rate=0.00123456789)
    current = params.current(search.base)
    assert current == {"learning_rate": 0.00123456789, "velocity.width": 8}
    drawing = ray_tune.OptunaSearch(
        {"values": {key: ray_tune._domain(one) for key, one in params.space.items()}}, metric="score", mode="max",
        points_to_evaluate=[{f"values/{key}": value for key, value in current.items()}],
    )  # fmt: skip
    first, second = (drawing.suggest(name)["values"] for name in ("first", "second"))
    assert Search.unpacked(search.packed()).tried(first) == current
    assert search.tried(second)["learning_rate"] == float(f"{second['learning_rate']:.3g}")


def test_trials_notice_that_their_features_changed(
    tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(tiny_features, tmp_path)
    monkeypatch.chdir(tmp_path)
    params = TuneParams.parse(TUNE, "tune")
    judged = judged_features("tiny", params.objective, tmp_path / "work")
    digests = Validation.open(FIT, judged, params.objective).digests
    search = replace(search_of(params), judged=judged, digests=digests)
    assert Search.unpacked(search.packed()).opened().digests == digests
    for number, name in enumerate(("fit/index.json", f"{judged.name}/index.json")):
        other = replace(search, digests=[*digests[:number], "another", *digests[number + 1 :]])
        with pytest.raises(WTFlowError, match=f"{name}: not the features that the search began with"):
            other.opened()
        told: list[dict[str, Any]] = []
        monkeypatch.setattr(tune, "report", told.append)
        ray_tune._trial({"search": other.packed(), "values": {"learning_rate": 0.002, "velocity.width": 8}})
        assert [name in one["ends"] for one in told] == [True]


@pytest.mark.usefixtures("kept")
def test_a_trial_that_was_killed_behind_its_last_epoch_has_its_result(
    tiny_fit: FeatureShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    opened = SimpleNamespace(fit=tiny_fit)
    monkeypatch.setattr(Search, "opened", lambda _: opened)
    monkeypatch.setattr(tune, "report", lambda metrics, checkpoint=None: told.append(metrics))
    search = search_of(TuneParams.parse(TUNE, "tune"), epochs=1)
    ray_tune._trial({"search": search.packed(), "values": {"learning_rate": 0.002, "velocity.width": 8}})
    assert [(one["epoch"], one["score"], one["failure"]) for one in told] == [(1, 0.5, None)]


def test_a_trial_that_found_other_features_ends_the_search_and_is_not_noted(tmp_path: Path) -> None:
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged/experiment_state-1.json").write_text("{}")
    trial = SimpleNamespace(storage=SimpleNamespace(experiment_driver_staging_path=str(tmp_path / "staged")))
    note = Note(str(tmp_path / "tiny-0"))
    note.on_trial_result(0, [trial], trial, {"curve": [{}]})
    note.on_trial_result(1, [trial], trial, {"ends": "fit/index.json: not the features."})
    with pytest.raises(
        WTFlowError, match=r"search tiny-0: fit/index\.json: not the features\. To go on, bring them back"
    ):
        note.on_step_end(1, [trial])
    note.on_experiment_end([trial])
    assert not (tmp_path / "tiny-0").exists()
    whole = Note(str(tmp_path / "tiny-0"))
    whole.on_experiment_end([trial])
    assert (tmp_path / "tiny-0" / Note.NAME).exists()


def test_ctrl_c_is_not_the_end_of_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit() -> None:
        assert ray_tune.os.environ["TUNE_DISABLE_SIGINT_HANDLER"] == "1"
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_tune, "_tuner", lambda *_: SimpleNamespace(fit=fit))
    monkeypatch.setattr(ray_tune, "cluster", lambda _: nullcontext())
    monkeypatch.setenv("TUNE_DISABLE_SIGINT_HANDLER", "0")
    with pytest.raises(WTFlowError, match=r"search tiny-0 was cut off\. The same command goes on with it"):
        ray_tune.run(search_of(TuneParams.parse(TUNE, "tune")), tmp_path, 1, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("address", "trials"), [(None, 2), ("", 2), ("local", 2), ("10.0.0.1:6379", 4)])
def test_a_ray_on_this_machine_has_as_many_trials_as_cores(
    address: str | None, trials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert trials_at_once(4, 2) == trials
    assert trials_at_once(1, 2) == 1


def test_the_noted_state_replaces_what_a_killed_driver_left(tmp_path: Path) -> None:
    assert not put_back(tmp_path)
    with zipfile.ZipFile(tmp_path / Note.NAME, "w") as note:
        note.writestr("experiment_state-1.json", "whole")
    for name in ("experiment_state-1.json", "experiment_state-2.json", "tuner.pkl", "spent.json"):
        (tmp_path / name).write_text("half")
    checkpoint(tmp_path / "first/checkpoint_000000", "first")
    assert put_back(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix in (".json", ".pkl")} == {
        "experiment_state-1.json": "whole",
        "tuner.pkl": "half",
        "spent.json": "half",
    }
    assert (tmp_path / "first/checkpoint_000000").exists()


def test_a_search_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    second = pytest.raises(WTFlowError, match="search tiny-0 is under way in another process")
    with alone(tmp_path / "tiny-0.lock", "busy"), second:
        ray_tune.run(search_of(TuneParams.parse(TUNE, "tune")), tmp_path, 1, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "failure",
    ["a score is not finite\nat epoch 3", "\x1b[36mray::Trial.restore()\x1b[39m\n  File x\na score is not finite"],
)
def test_the_table_says_why_a_trial_failed(failure: str) -> None:
    assert cause(failure) == "a score is not finite"
