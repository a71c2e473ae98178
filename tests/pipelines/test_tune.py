"""A search of the tiny line, its driver killed on the way."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml

from pipelines import tune
from pipelines.lines import line_params
from tests.guards.closure import ROOT
from tests.pipelines.searches import write_project
from tests.ray_processes import working
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


@pytest.mark.slow
def test_a_killed_search_goes_on_and_tries_as_many(project: Path) -> None:
    process = subprocess.Popen(
        COMMAND, cwd=project, env=environment(project), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("trial 2:"):
            break
    else:
        raise AssertionError("".join(seen))
    time.sleep(3)  # into the third, and beyond Ray's next note
    ray = working(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert psutil.wait_procs(ray, timeout=60)[1] == []
    before = curves(project)
    assert 2 <= len(before) < TRIALS
    states = [*project.glob(".wtflow/tune/tiny-*/*state*")]
    assert len(states) == 3
    for path in states:  # as if it had been killed while Ray wrote them
        path.write_bytes(path.read_bytes()[:99])

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
    tune._conclude("tiny", {"epochs": 7}, True, tmp_path)
    assert "lines.tiny.train of params.yaml now has epochs: 7" in capsys.readouterr().out
    assert line_params("tiny", "train", TrainParams).epochs == 7
