from pathlib import Path

import pytest

from benchmarks import tune_objective
from benchmarks.contest import trial
from pipelines.lines import read_params
from pipelines.search_space import SyntheticDefects, nested
from pipelines.validation import Validation, judged_features
from tests.benchmarks.place import tiny_product_line
from tests.guards.closure import ROOT
from tests.pipelines.searches import TUNE
from wtflow.artefact import read_json
from wtflow.params import merged
from wtflow.training import TrainParams


def test_every_configuration_is_settings_that_train_takes() -> None:
    train = read_params(ROOT / "params.yaml")["train"]
    parsed = [TrainParams.parse(merged(train, nested(changes)), "tests") for changes in tune_objective.CONFIGURATIONS]
    assert len({params.model_dump_json() for params in parsed}) == len(parsed)


def test_both_measures_of_two_configurations(
    tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_objective, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(tune_objective, "PLACE", tmp_path / "bench")
    line = tiny_product_line(tiny_features, tmp_path / "place")
    objective = SyntheticDefects.parse(TUNE["objective"], "tests")
    rows = tune_objective.measured(line, objective, ({}, {"learning_rate": 1e-6}), (0, 1))
    assert [row["configuration"] for row in rows] == ["as in params.yaml", "learning_rate 1e-06"]
    kept = [read_json(path) for path in (tmp_path / "kept").iterdir()]
    assert len(kept) == 4
    assert sorted(row["test_auroc"] for row in rows) != [rows[0]["test_auroc"]] * 2
    assert all(0.0 < figures[name] <= 1.0 for figures in kept for name in ("test_auroc", "score", "auroc/noise"))
    (rho,) = tune_objective.correlations(rows)
    assert abs(rho["score"]) == pytest.approx(1.0)  # of two
    (claim,) = tune_objective.claims(rows)
    assert claim.holds == (rho["score"] >= 0.5)
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "kept").iterdir())]
    assert tune_objective.measured(line, objective, ({}, {"learning_rate": 1e-6}), (0, 1)) == rows
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "kept").iterdir())] == stamps


def test_another_code_is_measured_anew(tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = tiny_product_line(tiny_features, tmp_path / "place")
    objective = SyntheticDefects.parse(TUNE["objective"], "tests")
    judged = judged_features(line.name, objective, tmp_path / "tune", line.place, line.raw)
    validation = Validation.open(line.features("fit"), judged, objective)
    path = tune_objective.kept(line, validation, objective, {}, 0)
    assert path == tune_objective.kept(line, validation, objective, {}, 0)
    others = [
        tune_objective.kept(line, validation, objective, {"epochs": 1}, 0),
        tune_objective.kept(line, validation, objective, {}, 1),
        tune_objective.kept(line, validation, objective.model_copy(update={"seed": 1}), {}, 0),
    ]
    code = trial._code
    for name in ("synthetic.py", "training.py", "validation.py"):
        monkeypatch.setattr(trial, "_code", lambda one, name=name: "changed" if one.name == name else code(one))
        others.append(tune_objective.kept(line, validation, objective, {}, 0))
    assert len({path, *others}) == 7
