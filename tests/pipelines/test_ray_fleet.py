"""Training as a task of the fleet does it: the bits of the plain loop, its checkpoints, several lines on one Ray."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipelines.adapters import ray_fleet
from pipelines.adapters.ray_fleet import KEPT, Checkpoints, News, fit_here, fleet
from pipelines.adapters.ray_train import forget
from pipelines.environment import RunSettings
from pipelines.lines import LINE_STAGES, line_params
from pipelines.train import train_line
from tests import tiny_line
from tests.guards.closure import ROOT
from tests.s3_server import environment
from tests.tiny_line import train_params
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.training import Epoch, TrainingState, TrainParams, be_deterministic, start, train


class Stop(Exception):
    """Ends a run as a kill would."""


def same(one: TrainingState, other: TrainingState) -> bool:
    """The same weights and history."""
    mine, theirs = one.scorer.state_dict(), other.scorer.state_dict()
    return one.history == other.history and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return RunSettings(work=tmp_path, storage=str(tmp_path / "kept"), threads=1, checkpoint_s=0)


def test_an_interrupted_task_ends_with_the_bits_of_the_plain_loop(
    tiny_fit: FeatureShards, settings: RunSettings
) -> None:
    params = train_params(epochs=4)
    whole = start(tiny_fit, params)
    train(whole, tiny_fit, params)
    heard: list[int] = []

    def until_the_third(epoch: Epoch) -> None:
        heard.append(epoch.epoch)
        if epoch.epoch == 2:
            raise Stop

    try:
        with pytest.raises(Stop):
            fit_here("run", tiny_fit.folder, params, settings, until_the_third)
        assert not torch.are_deterministic_algorithms_enabled()
        kept = sorted((Path(settings.storage) / "run/fleet").iterdir())
        assert [path.name for path in kept] == ["000002", "000003"]
        assert len(kept) == KEPT
        # the newest one is half written: the one before is continued
        file = kept[-1] / "optimiser.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        done = fit_here("run", tiny_fit.folder, params, settings, lambda epoch: heard.append(epoch.epoch))
        assert heard == [0, 1, 2, 2, 3]
        assert same(done, whole)
        assert not done.scorer.training
    finally:
        be_deterministic()


def test_short_epochs_have_one_checkpoint_at_the_end(tiny_fit: FeatureShards, settings: RunSettings) -> None:
    rare = settings.model_copy(update={"checkpoint_s": 600.0})
    fit_here("run", tiny_fit.folder, train_params(epochs=3), rare, lambda epoch: None)
    assert [path.name for path in (Path(settings.storage) / "run/fleet").iterdir()] == ["000003"]


def test_the_checkpoints_of_another_run_are_left_alone(tiny_fit: FeatureShards, settings: RunSettings) -> None:
    params = train_params(epochs=1)
    state = start(tiny_fit, params)
    Checkpoints(settings.storage, "one").save(state)
    fresh = start(tiny_fit, params)
    Checkpoints(settings.storage, "other").restore(fresh)
    assert fresh.history == []


def test_a_checkpoint_that_another_clone_dropped_is_no_error(
    tiny_fit: FeatureShards, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = start(tiny_fit, train_params(epochs=1))
    checkpoints, root = Checkpoints(settings.storage, "run"), Path(settings.storage) / "run/fleet"
    checkpoints.save(state)
    gone = [str(root / "gone")] * 2
    monkeypatch.setattr(Checkpoints, "_kept", lambda self: [*gone, str(root / "000000")])
    checkpoints.save(state)
    assert [path.name for path in root.iterdir()] == ["000000"]


def test_checkpoints_on_s3_are_kept_continued_and_removed(
    tiny_fit: FeatureShards, s3_port: int, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(f"http://127.0.0.1:{s3_port}").items():
        monkeypatch.setenv(name, value)
    params = train_params(epochs=3)
    settings = RunSettings(work=tmp_path, storage=f"s3://{bucket.name}/train", threads=1, checkpoint_s=0)

    def until_the_second(epoch: Epoch) -> None:
        if epoch.epoch == 1:
            raise Stop

    whole = fit_here("run", tiny_fit.folder, params, RunSettings(work=tmp_path, threads=1), lambda epoch: None)
    with pytest.raises(Stop):
        fit_here("run", tiny_fit.folder, params, settings, until_the_second)
    kept = {one.key.split("/")[3] for one in bucket.objects.filter(Prefix="train/run/fleet/0")}
    assert kept == {"000001", "000002"}
    bucket.put_object(Key="train/run/fleet/000002/scorer.safetensors", Body=b"half")  # the one before is continued
    heard: list[int] = []
    done = fit_here("run", tiny_fit.folder, params, settings, lambda epoch: heard.append(epoch.epoch))
    assert heard == [1, 2]
    assert same(done, whole)
    forget("run", settings)
    assert list(bucket.objects.filter(Prefix="train/run")) == []


def test_an_s3_that_cannot_be_written_to_is_named(
    tiny_fit: FeatureShards, s3_port: int, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(f"http://127.0.0.1:{s3_port}").items():
        monkeypatch.setenv(name, value)
    settings = RunSettings(work=tmp_path, storage="s3://no-such-bucket-here/train", threads=1)
    with pytest.raises(WTFlowError, match=r"WTFLOW_STORAGE: s3://no-such-bucket-here/train cannot be .*bucket's name"):
        fit_here("run", tiny_fit.folder, train_params(epochs=1), settings, lambda epoch: None)


@pytest.fixture
def place(tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to type commands in: two lines that can be trained, and one that cannot."""
    overrides = {"a": {}, "b": {"seed": 1}, "broken": {"fusion": {"levels": [1, 3]}}}  # 1 was not extracted
    lines = {line: {stage: {} for stage in LINE_STAGES} | {"train": train} for line, train in overrides.items()}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"lines": lines, "train": tiny_line.TRAIN}))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for package in ("wtflow", "pipelines"):
        (tmp_path / package).symlink_to(ROOT / package)
    for line in lines:
        (tmp_path / "data/features" / line).mkdir(parents=True)
        (tmp_path / "data/features" / line / "fit").symlink_to(tiny_features / "data/features/tiny/fit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


@pytest.mark.slow
def test_lines_on_one_ray_get_the_bundles_of_the_plain_loop(place: Path) -> None:
    settings = RunSettings(work=place / "work", threads=1)
    wanted = {}
    for line in ("a", "b"):
        params = line_params(line, "train", TrainParams)
        wanted[line] = train_line(line, params, settings, fit_here, lambda epoch: None).digest
        for folder in ("models", "work/fields"):
            shutil.rmtree(place / folder / line)
    assert wanted["a"] != wanted["b"]
    news: list[News] = []
    ended = {one.line: one for one in fleet(["a", "broken", "b"], settings, 2, news.extend)}
    assert {line: one.digest for line, one in ended.items()} == {**wanted, "broken": ""}
    assert "[1] were not extracted" in ended["broken"].error
    assert all(one.seconds > 0 for one in ended.values())
    for line, digest in wanted.items():
        assert json.loads((place / f"models/{line}/bundle.json").read_text())["digest"] == digest
        told = [one for one in news if one.line == line]
        assert [one.done for one in told][:1] == [0]
        assert {one.epochs for one in told} == {tiny_line.TRAIN["epochs"]}
    assert [path.name for path in (place / "work/train").iterdir()] == []


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"threads": 2}, "2 CPUs"),
        ({"threads": 1, "num_workers": 2}, "2 CPUs"),
        pytest.param({"threads": 1, "use_gpu": True}, "1 GPUs", marks=pytest.mark.slow),
    ],
)
def test_what_this_machine_never_has_is_not_waited_for(
    asked: dict[str, Any], what: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = RunSettings(work=place / "work", **asked)
    with pytest.raises(WTFlowError, match=rf"WTFLOW_THREADS.*a line asks for {what} at once, and Ray has [01] on"):
        list(fleet(["a"], settings, 1, lambda news: None))


@pytest.mark.slow
def test_a_node_without_the_project_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(type(place)):  # type: ignore[misc]
        @classmethod
        def cwd(cls) -> Path:
            return place / "nowhere"

    monkeypatch.setattr(ray_fleet, "Path", Elsewhere)
    (ended,) = fleet(["a"], RunSettings(work=place / "work", threads=1), 1, lambda news: None)
    assert "could not begin" in ended.error
    assert "died" not in ended.error
    assert ended.error.endswith(f"the project must be at the same path on all nodes, {place}/nowhere")
