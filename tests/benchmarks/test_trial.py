import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.contest import methods, pictures, trial
from benchmarks.contest.trial import Method
from benchmarks.product_lines import ProductLine
from tests import tiny_line
from tests.benchmarks.place import tiny_product_line
from wtflow.artefact import write_json
from wtflow.errors import WTFlowError

PADIM = next(method for method in methods.PEERS if method.name == "padim")


@pytest.fixture
def line(tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProductLine:
    """The tiny line, with everything that is kept in a folder of the test's own."""
    monkeypatch.setattr(trial, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(pictures, "PLACE", tmp_path)
    return tiny_product_line(tiny_features, tmp_path)


def test_the_key_knows_settings_split_and_seed_and_nothing_of_ours(line: ProductLine, tmp_path: Path) -> None:
    key = trial.key(PADIM, line, 0)
    assert key == trial.key(replace(PADIM, budget="other words"), line, 0)
    assert key != trial.key(PADIM, line, 1)
    assert key != trial.key(replace(PADIM, settings={"features": 100}), line, 0)
    other_training = tiny_product_line(line.raw.parents[2], tmp_path / "b", train={**tiny_line.TRAIN, "epochs": 9})
    assert key == trial.key(PADIM, other_training, 0)
    assert _default(line) != _default(other_training)
    other_split = tiny_product_line(
        line.raw.parents[2], tmp_path / "c", prepare={**tiny_line.PREPARE, "salt": "another"}
    )
    assert key != trial.key(PADIM, other_split, 0)


def _default(line: ProductLine) -> str:
    return trial.key(methods.preset("default", {}, line), line, 0)


def test_code_counts_and_its_comments_do_not(tmp_path: Path) -> None:
    def digest(text: str) -> str:
        (tmp_path / "code.py").write_text(text)
        return trial._code(tmp_path / "code.py")

    before = digest('"""Says this."""\ndef f():\n    """And this."""\n    return 1\n')
    assert before == digest('"""Says that."""\ndef f():  # which is 1\n    return  1\n')
    assert before != digest("def f():\n    return 2\n")


def test_what_is_kept_is_not_measured_again(line: ProductLine) -> None:
    kept = {"image_auroc": 0.5}
    write_json(trial.kept(PADIM, line, 0), kept)
    broken = replace(PADIM, module="benchmarks.peers.padim")
    assert trial.measure(broken, line, 0) == kept


def test_a_peer_without_its_environment_is_refused(line: ProductLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(trial.PEERS_PYTHON, raising=False)
    with pytest.raises(WTFlowError, match="make peers"):
        trial.measure(PADIM, line, 0)
    assert not trial.kept(PADIM, line, 0).exists()


def test_the_threshold_is_conformal_and_sees_no_test_score(line: ProductLine) -> None:
    rows = pictures.rows_of(line, "test")
    bad = np.array([row["label"] == "anomalous" for row in rows])
    assert 0 < bad.sum() < len(bad)
    held = {"scores": np.arange(40.0)}  # the 39th of 40: 38
    scores = np.where(bad, 50.0, 38.0)
    found = trial._figures(line, held, {"scores": scores})
    assert (found["image_auroc"], found["f1"], found["fpr"], found["tpr"]) == (1.0, 1.0, 0.0, 1.0)
    scores[~bad] = 39.0
    assert trial._figures(line, held, {"scores": scores})["fpr"] == 1.0
    with pytest.raises(WTFlowError):
        trial._figures(line, held, {"scores": scores[1:]})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wtflow-default", "neighbours"])
def test_our_own_run_end_to_end(line: ProductLine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "TARGET_FPR", 0.2)
    found = _run(next(method for method, _ in methods.entrants(line) if method.name == name), line)
    assert found["backbone_ms"] > 0
    assert found["image_auroc"] > 0.6


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get(trial.PEERS_PYTHON), reason=f"{trial.PEERS_PYTHON} is not set: make peers")
@pytest.mark.parametrize("name", ["padim", "fastflow", "reverse-distillation"])
def test_a_peer_runs_end_to_end(line: ProductLine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "TARGET_FPR", 0.2)
    method = next(method for method in methods.PEERS if method.name == name)
    small = {"epochs": 1, "batch_size": 8} if "epochs" in method.settings else method.settings
    found = _run(replace(method, settings=small), line)
    assert found["model_bytes"] > 1_000_000
    assert 0 <= found["fpr"] <= 1


def _run(method: Method, line: ProductLine) -> dict[str, Any]:
    found = trial.measure(method, line, 0)
    assert (found["method"], found["line"], found["seed"]) == (method.name, line.name, 0)
    assert trial.measure(method, line, 0) == found
    assert [path.name for path in trial.KEPT.iterdir()] == [trial.kept(method, line, 0).name]
    return found
