"""The whole road on a small line of real photographs: DVC, Ray Train, MLflow, and what users do with them."""

import json
import shutil
from pathlib import Path

import mlflow
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from tests.e2e.project import Project, make_project
from wtflow.bundle import load_bundle
from wtflow.data.images import decode
from wtflow.data.version import data_version

pytestmark = pytest.mark.slow
STAGES = ("prepare", "extract", "train", "evaluate", "register")
METRICS = {
    "image_auroc", "image_ap", "image_f1", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_aupro_30",
    "pixel_aupro_05", "pixel_spro_05", "threshold",
    "target_fpr", "fpr", "tpr", "n_test_normal", "n_test_anomalous", "uncertain_above_threshold",
    "bundle_digest", "seed",
}  # fmt: skip


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The small line brought by `dvc add`, reproduced once, and committed as docs/data-contracts.md says."""
    project = make_project(tmp_path_factory.mktemp("road"))
    project.run("dvc", "add", "data/raw/tiny")
    project.commit("data/raw/.gitignore", "data/raw/tiny.dvc")
    project.run("dvc", "repro")
    project.commit("dvc.lock", "metrics", "plots")
    return project


def test_every_stage_leaves_what_it_promises(road: Project) -> None:
    metrics = json.loads((road.root / "metrics/tiny.json").read_text())
    assert set(metrics) == METRICS
    assert metrics["pixel_auroc"] is None
    scored = pq.read_table(road.root / "evaluations/tiny/per_image.parquet").to_pandas().query("label != 'uncertain'")
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score(scored.label == "anomalous", scored.score), abs=1e-6)
    assert metrics["n_test_anomalous"] == 12
    assert metrics["bundle_digest"] == load_bundle(road.root / "models/tiny").digest
    assert "<img" in (road.root / "reports/tiny/index.html").read_text()


def test_data_version_is_dvcs_and_travels_into_the_bundle(road: Project) -> None:
    recorded = yaml.safe_load((road.root / "data/raw/tiny.dvc").read_text())["outs"][0]["md5"]
    assert data_version(road.root / "data/raw/tiny") == recorded
    assert load_bundle(road.root / "models/tiny").provenance["data_version"] == recorded


def test_nothing_is_done_twice(road: Project) -> None:
    lock = (road.root / "dvc.lock").read_bytes()
    assert "Data and pipelines are up to date." in road.run("dvc", "repro")
    assert "up to date" in road.run("dvc", "status")
    assert (road.root / "dvc.lock").read_bytes() == lock
    assert "image_auroc" in road.run("dvc", "metrics", "show", "--md")


def test_a_change_of_code_makes_the_stages_behind_it_stale_and_no_others(road: Project) -> None:
    source = road.root / "wtflow/scoring/bootstrap.py"
    before = source.read_text()
    source.write_text(before + "# changed\n")
    digests = ("code-evaluate", "code-register")
    assert set(json.loads(road.run("dvc", "status", "--json"))) == set(digests)
    road.run("dvc", "repro", "-q", *digests)
    assert set(json.loads(road.run("dvc", "status", "--json"))) == {"evaluate@tiny", "register@tiny"}
    source.write_text(before)
    road.run("dvc", "repro", "-q", *digests)
    assert "up to date" in road.run("dvc", "status")


def test_a_second_clone_ends_with_the_same_bytes_and_nothing_to_commit(road: Project, tmp_path: Path) -> None:
    """Everything is computed again: the clone has neither cache nor registry, only the photographs."""
    assert road.run("git", "status", "--porcelain") == ""
    road.run("git", "clone", "-q", ".", str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    shutil.copytree(road.root / "data/raw/tiny", clone.root / "data/raw/tiny")
    printed = clone.run("dvc", "repro")
    assert [stage for stage in STAGES if f"Running stage '{stage}@tiny'" not in printed] == []
    assert clone.run("git", "status", "--porcelain") == ""  # dvc.lock, metrics and loss curve are in git
    for name in ("models/tiny/bundle.json", "registry/tiny.json", "evaluations/tiny/per_image.parquet"):
        assert (clone.root / name).read_bytes() == (road.root / name).read_bytes(), name


def test_registry_holds_the_champion_and_pyfunc_scores_like_the_detector(road: Project) -> None:
    mlflow.set_tracking_uri(road.environment["MLFLOW_TRACKING_URI"])
    client = mlflow.MlflowClient()
    model = client.get_registered_model("wtflow-tiny")
    assert set(model.aliases) == {"champion", "challenger"}
    version = client.get_model_version_by_alias("wtflow-tiny", "champion")
    bundle = load_bundle(road.root / "models/tiny")
    assert version.tags["bundle_digest"] == bundle.digest
    assert version.tags["git_commit"] == bundle.provenance["git_commit"]
    assert version.tags["data_version"] == bundle.provenance["data_version"]
    losses = client.get_metric_history(version.run_id, "loss")
    assert [point.step for point in losses] == list(range(6))

    image = Path(version.tags["sample_image"]).read_bytes()
    scored = mlflow.pyfunc.load_model("models:/wtflow-tiny@champion").predict(pd.DataFrame({"image": [image]}))
    detector = bundle.detector()
    verdict = detector.verdicts([decode(image, detector.limits)])[0]
    assert scored["score"][0] == pytest.approx(verdict.score, abs=1e-6)
    assert bool(scored["is_anomalous"][0]) == verdict.is_anomalous


def test_a_worse_challenger_does_not_become_champion(road: Project) -> None:
    table = road.run("dvc", "exp", "run", "-S", "train.seed=3", "-S", "lines.tiny.train.epochs=1", "-n", "worse")
    assert "register tiny" in table
    client = mlflow.MlflowClient(road.environment["MLFLOW_TRACKING_URI"])
    aliases = client.get_registered_model("wtflow-tiny").aliases
    auroc = {
        alias: float(client.get_model_version("wtflow-tiny", str(number)).tags["image_auroc"])
        for alias, number in aliases.items()
    }
    if auroc["challenger"] < auroc["champion"] - 0.005:
        assert aliases["champion"] != aliases["challenger"]
    else:
        assert aliases["champion"] == aliases["challenger"]
    assert int(aliases["challenger"]) == 2


def test_a_wrong_key_names_itself_and_the_known_ones(road: Project) -> None:
    road.configure(train={"epoch": 3})
    message = road.run("python", "-m", "pipelines.train", "tiny", code=1)
    assert "epoch" in message
    assert "known keys" in message
    assert "Traceback" not in message
