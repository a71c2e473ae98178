"""Training on two workers of Ray Train: the samples of one, the same bits each time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.adapters import ray_train
from pipelines.adapters.ray_runtime import cluster
from pipelines.environment import RunSettings
from tests.guards.closure import ROOT
from tests.tiny_line import train_params
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.training import Epoch, start, train

PLACES = {"velocity": {"kind": "location"}, "batches": {"kind": "places", "places": 63}}  # not to be halved


@pytest.fixture(autouse=True)
def own_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by the test, on the project's code."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_full_disk_is_told_with_its_folder(tmp_path: Path) -> None:
    settings = RunSettings(storage=str(tmp_path))
    copied = "[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"
    assert f"no space left for {tmp_path}/run. Free some" in ray_train._failed(copied, "run", settings)
    written = "OSError: [Errno 28] No space left on device: '/tmp/x/scorer.safetensors'"
    assert "no space left for /tmp/x/scorer.safetensors." in ray_train._failed(written, "run", settings)
    assert "mend the cause" in ray_train._failed("out of luck", "run", settings)


@pytest.mark.slow
def test_two_workers_train_as_one_does(tiny_fit: FeatureShards, tmp_path: Path) -> None:
    """What a step sees does not depend on the number of workers, so that only the order of sums differs."""
    params = train_params(epochs=3, **PLACES)
    settings = RunSettings(work=tmp_path, storage="", threads=2, num_workers=2)
    with cluster(2):
        once, again = (
            ray_train.fit(name, tiny_fit.folder, params, settings, lambda epoch: None) for name in ("once", "again")
        )
    alone = start(tiny_fit, params)
    train(alone, tiny_fit, params)
    mine, theirs = once.scorer.state_dict(), again.scorer.state_dict()
    assert once.history == again.history
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for one, other in zip(alone.history, once.history, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    for name, weight in alone.scorer.state_dict().items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_what_another_start_would_not_mend_is_told_at_once(tiny_fit: FeatureShards, tmp_path: Path) -> None:
    settings, told = RunSettings(work=tmp_path, storage="", threads=1), list[Epoch]()
    params = train_params(epochs=50, learning_rate=1e30)
    with cluster(1), pytest.raises(WTFlowError) as raised:
        ray_train.fit("run", tiny_fit.folder, params, settings, told.append)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith(f"training run failed: training: the loss of epoch {len(told)} is ")
    assert "Lower train.learning_rate" in lines[0]
    assert lines[-1].startswith("Its checkpoints are kept in ")
    assert "Traceback" not in str(raised.value)


@pytest.mark.slow
def test_a_training_that_ends_early_is_an_error_and_no_bundle(
    tiny_fit: FeatureShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends_early(config: dict[str, Any]) -> None:
        ray_train._train_here({**config, "params": {**config["params"], "epochs": 1}})

    monkeypatch.setattr(ray_train, "_worker", ends_early)
    settings = RunSettings(work=tmp_path, storage="", threads=1)
    with cluster(1), pytest.raises(WTFlowError, match="training run failed: it ended after 1 of 3 epochs"):
        ray_train.fit("run", tiny_fit.folder, train_params(epochs=3), settings, lambda epoch: None)


def test_workers_that_this_machine_has_no_cpus_for_are_refused(tiny_fit: FeatureShards, tmp_path: Path) -> None:
    settings = RunSettings(work=tmp_path, threads=2, num_workers=4)
    with pytest.raises(WTFlowError, match="4 CPUs at once, and Ray has 2 on this machine"):
        ray_train.fit("run", tiny_fit.folder, train_params(epochs=1), settings, lambda epoch: None)


@pytest.mark.slow
def test_resources_that_a_cluster_never_gets_are_not_waited_for_without_end(
    tiny_fit: FeatureShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    monkeypatch.setattr(ray_train, "WAITS", 1)
    settings = RunSettings(work=tmp_path, threads=2, num_workers=2)
    with cluster(1), pytest.raises(WTFlowError, match=r"training run failed: .*(?s:.*)resources"):
        ray_train.fit("run", tiny_fit.folder, train_params(epochs=1), settings, lambda epoch: None)


@pytest.mark.slow
def test_a_queue_that_dies_takes_nothing_with_it(caplog: pytest.LogCaptureFixture) -> None:
    with cluster(1):
        import ray

        with ray_train._watched(lambda epoch: None, lambda error: None) as queue:
            ray.kill(queue.actor)
    assert "the epochs' queue is gone" in caplog.text
