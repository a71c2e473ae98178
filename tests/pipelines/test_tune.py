"""A search of the tiny line, its driver killed on the way."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml

from pipelines import tune
from pipelines.adapters import ray_tune
from pipelines.adapters.ray_tune import Trial
from pipelines.adapters.search_tracking import SearchRun
from pipelines.lines import line_params
from pipelines.search_space import nested
from tests.guards.closure import ROOT
from tests.pipelines.searches import write_project
from tests.ray_processes import working
from wtflow.errors import WTFlowError
from wtflow.params import merged
from wtflow.training import TrainParams

COMMAND = [sys.executable, "-m", "pipelines.tune", "tiny"]
TRIALS = 5
EPOCHS = 64
"""Of a trial: many enough that a search is not over in the seconds before its driver is killed."""


@pytest.fixture(scope="module")
def project(tiny_features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tune")
    write_project(tiny_features, place, budget={"trials": TRIALS}, halving={"grace_epochs": EPOCHS // 2})
    for package in ("wtflow", "pipelines"):  # Ray's workers find the code where the command is typed
        (place / package).symlink_to(ROOT / package)
    settings = yaml.safe_load((place / "params.yaml").read_text())
    settings["train"]["epochs"] = EPOCHS
    (place / "params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return place


def environment(project: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "WTFLOW_WORK")}
    return kept | {
        "PYTHONPATH": str(project),
        "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db",
        "WTFLOW_THREADS": "1",
    }


def run(project: Path, *more: str, code: int = 0) -> str:
    done = subprocess.run(
        [*COMMAND, *more], cwd=project, env=environment(project), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def curves(project: Path) -> dict[str, "Counter[int]"]:
    """By trial: how often the score of each epoch was logged."""
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiment = client.get_experiment_by_name("wtflow")
    if experiment is None:
        return {}
    runs = client.search_runs([experiment.experiment_id])
    trials = [one for one in runs if "mlflow.parentRunId" in one.data.tags]
    return {
        one.info.run_name: Counter(point.step for point in client.get_metric_history(one.info.run_id, "score"))
        for one in trials
    }


def started(project: Path, until: str) -> "subprocess.Popen[str]":
    """A search that is under way, and has printed a line that begins so."""
    process = subprocess.Popen(  # Ctrl-C is heard, also where the tests run in the background
        ["env", "--default-signal=INT", *COMMAND],
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(until):
            return process
    raise AssertionError("".join(seen))


@pytest.mark.slow
def test_a_killed_search_goes_on_and_tries_as_many(project: Path) -> None:
    process = started(project, "trial 2:")
    time.sleep(3)  # into the third, and beyond Ray's next note
    ray = working(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert psutil.wait_procs(ray, timeout=60)[1] == []
    before = curves(project)
    assert 2 <= len(before) < TRIALS
    states = [*project.glob(".wtflow/tune/tiny-*/*state*")]
    assert len(states) == 3
    for path in states:  # as if it had been killed while Ray wrote them
        path.write_bytes(path.read_bytes()[:99])

    process = started(project, "trial 3:")
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 1, told
    assert "was cut off. The same command goes on with it." in told
    assert "best first" not in told

    printed = run(project)
    after = curves(project)
    assert len(after) == TRIALS, printed
    ended = [name for name, epochs in before.items() if len(epochs) == EPOCHS]
    assert ended
    assert {name: after[name] for name in ended} == {name: before[name] for name in ended}  # not trained again
    assert printed.count("as in params.yaml") == 1
    assert sum(name in printed for name in after) == TRIALS
    (folder,) = (project / ".wtflow/tune").glob("tiny-*.pictures")
    assert {path.name for path in folder.iterdir()} >= {"history.png", "parallel.png"}
    _check_runs(project)

    again = run(project, "--apply")  # shown again; nothing is tried
    assert curves(project) == after
    assert "nothing to change" in run(project, "--apply")  # nor once it is applied
    assert curves(project) == after
    lines = [line for line in printed.splitlines() if line.startswith(("Best for tiny", "The settings of tiny"))]
    assert len(lines) == 1
    if lines[0].startswith("Best"):
        text = lines[0].removeprefix("Best for tiny: ")
        assert f"now has {text}" in again
        best = dict(pair.split(": ") for pair in text.split(", "))
        os.chdir(project)
        params = line_params("tiny", "train", TrainParams)
        assert {"learning_rate": str(params.learning_rate), "velocity.width": str(params.velocity.width)}.items() >= (
            best.items()
        )


def _check_runs(project: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("wtflow").experiment_id])
    (parent,) = [one for one in runs if "mlflow.parentRunId" not in one.data.tags]
    trials = [one for one in runs if one is not parent]
    assert {one.data.tags["mlflow.parentRunId"] for one in trials} == {parent.info.run_id}
    assert {one.info.status for one in runs} == {"FINISHED"}
    assert parent.data.metrics["trials"] == TRIALS
    assert {path.path for path in client.list_artifacts(parent.info.run_id)} >= {"history.png", "parallel.png"}
    best = max(one.data.metrics["score"] for one in trials if one.data.metrics.get("score"))
    assert 0.5 < parent.data.metrics["best_score"] <= best
    assert {"auroc/noise", "auroc/cut-paste", "loss", "learning_rate", "score"} <= set(trials[0].data.metrics)


def test_help_shows_examples() -> None:
    done = subprocess.run([*COMMAND[:-1], "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "python -m pipelines.tune solar-mono --apply" in done.stdout


def test_a_line_whose_sections_are_left_empty_ends_with_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["lines"] = {"tiny": dict.fromkeys(settings["lines"]["solar-mono"])}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    base = line_params("tiny", "train", TrainParams).model_dump(mode="json")
    tune._conclude("tiny", base, {"epochs": 7}, True, tmp_path)
    assert "lines.tiny.train of params.yaml now has epochs: 7" in capsys.readouterr().out
    assert line_params("tiny", "train", TrainParams).epochs == 7


@pytest.fixture
def small(tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_project(tiny_features, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "WTFLOW_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


BEST: dict[str, Any] = {"learning_rate": 0.003, "velocity.width": 16}


def edit(place: Path, **train: Any) -> None:
    values = yaml.safe_load((place / "params.yaml").read_text())
    (place / "params.yaml").write_text(yaml.safe_dump(merged(values, {"train": train}), sort_keys=False))


def test_the_best_is_written_as_it_was_tried(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tune._base("tiny")
    edit(small, learning_rate=0.0005)  # while the search ran
    tune._conclude("tiny", base, BEST, True, small)
    assert tune._base("tiny") == merged(base, nested(BEST))
    tune._conclude("tiny", base, BEST, True, small)
    assert "nothing to change" in capsys.readouterr().out


def test_other_settings_than_those_of_the_search_are_not_applied(small: Path) -> None:
    base = tune._base("tiny")
    edit(small, epochs=3)
    before = (small / "params.yaml").read_text()
    with pytest.raises(WTFlowError, match=r"params\.yaml: train \(with lines\.tiny\.train\) changed during the search"):
        tune._conclude("tiny", base, BEST, True, small)
    assert (small / "params.yaml").read_text() == before
    (small / "params.yaml").write_text(before.replace("tiny", "tidy"))
    with pytest.raises(WTFlowError, match="no line 'tiny' under `lines`"):
        tune._conclude("tiny", base, BEST, True, small)


def test_a_search_s_name_says_what_it_tries(small: Path) -> None:
    params, base, features = tune.tune_params("tiny"), tune._base("tiny"), {small / "fit": "1", small / "judged": "2"}
    name = tune.search_name("tiny", params, base, features)
    assert tune.search_name("tiny", params, merged(base, nested(BEST)), features) == name  # its best was applied
    others = [
        tune.search_name("tiny", params.model_copy(update={"seed": 1}), base, features),
        tune.search_name("tiny", params, {**base, "epochs": 3}, features),
        tune.search_name("tiny", params, base, {**features, small / "judged": "3"}),
        tune.search_name("tiny", params, base, {small / "fit": "1", small / "moved/judged": "2"}),
    ]
    assert len({name, *others}) == 5


def test_searches_of_other_libraries_have_other_names(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, base = tune.tune_params("tiny"), tune._base("tiny")
    name = tune.search_name("tiny", params, base, {small: "1"})
    for library in ("ray", "optuna"):
        with monkeypatch.context() as patch:
            patch.setattr(tune, "version", lambda one, changed=library: "0" if one == changed else version(one))
            assert tune.search_name("tiny", params, base, {small: "1"}) != name


def trial(failure: str | None = None, epochs: int = 2, **values: Any) -> Trial:
    curve = [{"epoch": float(number), "score": 0.7} for number in range(epochs)]
    return Trial("first", {**BEST, **values}, 2, curve, failure)


def test_what_is_wrong_when_no_trial_was_whole(tmp_path: Path) -> None:
    assert tune._best("tiny", [trial("not finite"), trial()], tmp_path) == trial()
    with pytest.raises(WTFlowError, match=r"all 2 trials failed, the first of them: not finite\nMend tune\.space"):
        tune._best("tiny", [trial("not finite\nand more"), trial("too wide")], tmp_path)
    with pytest.raises(
        WTFlowError, match=r"no trial of 2 was trained to the end\. Raise tune\.budget.* 1 failed, .*wide"
    ):
        tune._best("tiny", [trial(epochs=1), trial("too wide", 1)], tmp_path)
    with pytest.raises(WTFlowError, match=r"no trial of 0 was trained to the end\. Raise tune\.budget"):
        tune._best("tiny", [], tmp_path)


@pytest.mark.usefixtures("small")
def test_a_tracking_server_that_fails_does_not_hide_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[int] = []

    def run(search: ray_tune.Search, folder: Path, cores: int, tracked: SearchRun) -> list[Trial]:
        given.append(cores)
        return [trial()]

    def finish(*_: Any) -> None:
        raise WTFlowError("MLflow is gone")

    monkeypatch.setattr(ray_tune, "run", run)
    monkeypatch.setattr(SearchRun, "begin", lambda *_: None)
    monkeypatch.setattr(SearchRun, "finish", finish)
    with pytest.raises(WTFlowError, match="MLflow is gone"):
        tune.main("tiny", apply=False)
    printed = capsys.readouterr().out
    assert "0.7000" in printed
    assert "as they stand, they were not tried" in printed
    assert given == [1]  # WTFLOW_THREADS
