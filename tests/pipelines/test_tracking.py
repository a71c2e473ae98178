"""What a training tells MLflow, and an MLflow that does not answer."""

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
import requests
from mlflow.entities import Metric
from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR as PROGRESS_BAR
from mlflow.exceptions import MlflowException

from pipelines.adapters import tracking as adapter
from pipelines.adapters.search_tracking import SearchRun
from pipelines.adapters.tracking import TrainingRun
from tests.tiny_line import train_params
from wtflow.errors import WTFlowError
from wtflow.training import Epoch


class Broken:
    """A client whose server is gone."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def fail(*_: object, **__: object) -> NoReturn:
            raise self.error

        return fail


def epoch(number: int, loss: float = 0.5) -> Epoch:
    return Epoch(
        number,
        loss,
        learning_rate=0.1,
        gradient_norm=0.2,
        c=0.0,
        mean_y2=0.9,
        images_per_s=100.0,
        memory_gb=0.5,
    )


@pytest.fixture(
    params=[MlflowException("no answer"), requests.ConnectionError("no answer")], ids=["mlflow", "requests"]
)
def client(request: pytest.FixtureRequest) -> Any:
    return Broken(request.param)


def test_an_epoch_that_is_not_noted_ends_no_training(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = TrainingRun("line", "line-0", train_params())
    run.client, run.run_id = client, "1"
    with caplog.at_level(logging.WARNING):
        run.log(epoch(2))
    assert "line-0: epoch 2 could not be noted in MLflow at" in caplog.text
    assert "no answer" in caplog.text


def test_short_epochs_share_a_call_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr(adapter, "TOLD_EVERY_S", 1e9)
    told = []
    with suppress(ZeroDivisionError), TrainingRun("line", "line-0", train_params()) as run:
        log_batch = run.client.log_batch

        def counted(run_id: str, points: list[Metric]) -> None:
            told.append([point.step for point in points])
            log_batch(run_id, points)

        run.client.log_batch = counted  # type: ignore[method-assign, assignment]
        for number in range(5):
            run.log(epoch(number, loss=2.0 - number / 4))
        raise ZeroDivisionError
    assert [sorted(set(steps)) for steps in told] == [[0], [1, 2, 3, 4]]  # the first one is seen at once
    history = run.client.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 2.0), (1, 1.75), (2, 1.5), (3, 1.25), (4, 1.0)]
    assert run.client.get_run(run.run_id).info.status == "FAILED"
    assert set(run.client.get_run(run.run_id).data.metrics) == {
        "loss", "learning_rate", "gradient_norm", "c", "mean_y2", "images_per_s", "memory_gb"
    }  # fmt: skip


@pytest.mark.parametrize("asked", [None, "true"])
def test_mlflow_shows_no_bars_of_its_own_unless_asked(
    asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv(PROGRESS_BAR.name, asked or "")
    if asked is None:
        monkeypatch.delenv(PROGRESS_BAR.name)
    with adapter.tracking():
        assert PROGRESS_BAR.get() is (asked == "true")


@pytest.mark.parametrize("wanted", [True, False])
def test_the_load_of_the_machine_goes_to_the_run(wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    if not wanted:
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    with TrainingRun("line", "line-0", train_params()) as run:
        deadline = time.monotonic() + (60 if wanted else 1)
        while time.monotonic() < deadline and not run.client.get_run(run.run_id).data.metrics:
            time.sleep(0.1)
    with TrainingRun("line", "line-0", train_params()) as again:  # as after a kill: the same run goes on
        assert again.run_id == run.run_id
        assert run.client.get_run(run.run_id).info.status == "RUNNING"
    told = set(run.client.get_run(run.run_id).data.metrics)
    assert ({"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= told) is wanted


def test_a_machine_that_does_not_tell_its_load_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")

    def hidden(*_: Any, **__: Any) -> NoReturn:
        raise AttributeError("'NoneType' object has no attribute 'bytes_recv'")

    monkeypatch.setattr("psutil.net_io_counters", hidden)
    with caplog.at_level(logging.WARNING), TrainingRun("line", "line-0", train_params()) as run:
        run.finish("0" * 64)
    assert "the machine's load will not be in MLflow: 'NoneType'" in caplog.text
    assert run.client.get_run(run.run_id).info.status == "FINISHED"


def test_the_bundle_of_a_training_must_be_noted() -> None:
    run = TrainingRun("line", "line-0", train_params())
    run.client, run.run_id = Broken(MlflowException("no answer")), "1"  # type: ignore[assignment]
    with pytest.raises(WTFlowError, match="does the server run"):
        run.finish("0" * 64)


def test_a_trial_that_is_not_noted_ends_no_search(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = SearchRun("line", "line-0")
    run._client, run.experiment, run.parent = client, "0", "1"
    with caplog.at_level(logging.WARNING):
        run.log("a", {"learning_rate": 0.1}, {"epoch": 0, "loss": 0.5})
        run._runs["a"] = "2"
        run.log("a", {"learning_rate": 0.1}, {"epoch": 1, "loss": 0.5})
        run.end("a", "FINISHED")
    for what in ("epoch 0", "epoch 1", "its end"):
        assert f"trial a: {what} could not be noted in MLflow at" in caplog.text
