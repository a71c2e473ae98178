"""The stage on real photographs, features and a trained bundle."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from pipelines import evaluate
from pipelines.evaluate import PER_IMAGE_SCHEMA
from tests import tiny_line
from wtflow.artefact import read_json, write_json
from wtflow.bundle import load_bundle
from wtflow.data.images import ImageLimits
from wtflow.data.manifest import Manifest
from wtflow.data.shards import FeatureShards
from wtflow.errors import DigestError, WTFlowError
from wtflow.features.backbone import build_backbone
from wtflow.features.cache import FeatureCache
from wtflow.features.extract import Job, extract

PARAMS = """
lines:
  tiny: {prepare: {}, extract: {}, train: {}, evaluate: {gallery: 2}, register: {}}
  masked: {prepare: {}, extract: {}, train: {}, evaluate: {resolution: [32, 32]}, register: {}}
evaluate:
  resolution: [64, 64]
  gallery: 1
"""
KEYS = {
    "image_auroc", "image_ap", "image_f1", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_aupro_30",
    "pixel_aupro_05", "pixel_spro_05", "threshold",
    "target_fpr", "fpr", "tpr", "n_test_normal", "n_test_anomalous", "uncertain_above_threshold", "bundle_digest",
    "seed",
}  # fmt: skip
LABELS = ("normal", "anomalous", "uncertain")
OUTPUTS = ("metrics/{}.json", "evaluations/{}/per_image.parquet", "reports/{}/index.html")


def write_workspace(root: Path, tiny_features: Path, tiny_bundle: Path) -> None:
    """Inputs of the line `tiny` where the stage looks for them; it writes only beside them."""
    (root / "params.yaml").write_text(PARAMS)
    for place in ("data/raw/tiny", "data/features/tiny"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).symlink_to(tiny_features / place)
    (root / "models").mkdir()
    (root / "models/tiny").symlink_to(tiny_bundle)


@pytest.fixture
def workspace(tiny_features: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which nothing was evaluated yet."""
    write_workspace(tmp_path, tiny_features, tiny_bundle)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WTFLOW_THREADS", "1")
    return tmp_path


@pytest.fixture(scope="module")
def evaluated(tiny_features: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which `tiny` was evaluated. Not to be changed."""
    root = tmp_path_factory.mktemp("evaluated")
    write_workspace(root, tiny_features, tiny_bundle)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("WTFLOW_THREADS", "1")
        evaluate.main("tiny")
    return root


def write_masked_line(tiny_features: Path, tiny_bundle: Path) -> None:
    """The line `masked`: the test images of `tiny`, the anomalous ones with a mask of their darkest tenth."""
    shutil.copytree(tiny_features / "data/raw/tiny", "data/raw/masked")
    Path("models/masked").symlink_to(tiny_bundle)
    rows = Manifest.read(tiny_features / "data/prepared/tiny/manifest.parquet").rows("test")
    for row in rows:
        if row["label"] == "anomalous":
            row["mask_path"] = f"masks/{row['image_id']}.png"
            grey = np.asarray(Image.open(Path("data/raw/masked") / row["path"]).convert("L"))
            mask = Image.fromarray(((grey < np.quantile(grey, 0.1)) * 255).astype(np.uint8))
            Path("data/raw/masked/masks").mkdir(exist_ok=True)
            mask.save(Path("data/raw/masked") / row["mask_path"])
    params, shards = tiny_line.extract_params(), FeatureShards.open(tiny_features / "data/features/tiny/test")
    facts = {key: shards.header[key] for key in ("line", "data_version", "manifest_digest", "backbone", "limits")}
    limits = ImageLimits.parse(tiny_line.PREPARE["limits"], "tests")
    job = Job(Path("data/raw/masked"), FeatureCache(Path("cache")), build_backbone(params.backbone), params, limits)
    extract(rows, Path("data/features/masked/test"), job, facts)


def digests(root: Path) -> list[str]:
    return [hashlib.sha256((root / output.format("tiny")).read_bytes()).hexdigest() for output in OUTPUTS]


def test_metrics_follow_from_the_rows(evaluated: Path, tiny_bundle: Path) -> None:
    metrics, bundle = read_json(evaluated / "metrics/tiny.json"), load_bundle(tiny_bundle)
    rows = pq.read_table(evaluated / "evaluations/tiny/per_image.parquet").to_pylist()
    scores = {label: [row["score"] for row in rows if row["label"] == label] for label in LABELS}
    assert set(metrics) == KEYS
    both = scores["normal"] + scores["anomalous"]
    truth = [False] * len(scores["normal"]) + [True] * len(scores["anomalous"])
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score(truth, both), abs=1e-6)
    assert metrics["image_ap"] == pytest.approx(average_precision_score(truth, both), abs=1e-6)
    assert metrics["threshold"] == pytest.approx(bundle.calibration.threshold, abs=1e-6)
    assert metrics["target_fpr"] == 0.2
    shares = [np.mean(np.array(scores[label]) > bundle.calibration.threshold) for label in LABELS]
    found = [metrics[key] for key in ("fpr", "tpr", "uncertain_above_threshold")]
    assert found == pytest.approx(shares, abs=1e-6)
    assert (metrics["n_test_normal"], metrics["n_test_anomalous"]) == (len(scores["normal"]), 8)
    assert (metrics["bundle_digest"], metrics["seed"]) == (bundle.digest, 0)
    assert [metrics[key] for key in ("pixel_auroc", "pixel_ap", "pixel_aupro_30", "pixel_aupro_05")] == [None] * 4


def test_the_metrics_are_plain_json(evaluated: Path) -> None:
    text = (evaluated / "metrics/tiny.json").read_text(encoding="utf-8")
    assert set(json.loads(text, parse_constant=pytest.fail)) == KEYS


def test_a_row_for_every_test_image(evaluated: Path, tiny_test: FeatureShards, tiny_bundle: Path) -> None:
    table = pq.read_table(evaluated / "evaluations/tiny/per_image.parquet")
    assert table.schema.equals(PER_IMAGE_SCHEMA)
    kept = ["image_id", "path", "label", "defect"]
    assert table.select(kept).to_pylist() == tiny_test.index.sort_by("image_id").select(kept).to_pylist()
    calibration, scores = load_bundle(tiny_bundle).calibration, table["score"].to_numpy()
    assert table["p_value"].to_pylist() == calibration.p_value(scores).tolist()
    assert not any(table["needs_review"].to_pylist())  # the line asks for no band
    assert table["is_anomalous"].to_pylist() == (scores > calibration.threshold).tolist()


def test_the_report_shows_the_lines_own_photographs(evaluated: Path) -> None:
    page = (evaluated / "reports/tiny/index.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 2 + 2 + 1  # the line's own `gallery: 2`
    assert "no anomalous image of this line has a mask" in page


def test_a_second_run_writes_the_same_bytes_and_says_what_it_found(
    evaluated: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main("tiny")
    assert digests(workspace) == digests(evaluated)
    said = " ".join(capsys.readouterr().out.split())
    auroc = read_json(workspace / "metrics/tiny.json")["image_auroc"]
    assert said.startswith(f"evaluate tiny: image AUROC {auroc:.3f} on ")
    assert said.endswith("See reports/tiny/index.html")


def relabel(folder: Path, labels: Mapping[str, str]) -> None:
    """Give the images of these ids another label in the features of the workspace."""
    index = pq.read_table(folder / "index.parquet")
    told = [labels[image_id] for image_id in index["image_id"].to_pylist()]
    place = index.schema.get_field_index("label")
    pq.write_table(index.set_column(place, index.schema.field(place), [told]), folder / "index.parquet")
    header = read_json(folder / "index.json")
    header["files"]["index.parquet"] = hashlib.sha256((folder / "index.parquet").read_bytes()).hexdigest()
    write_json(folder / "index.json", header)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("at_chance", [True, False])
def test_a_model_at_chance_is_called_so(
    at_chance: bool, evaluated: Path, tiny_features: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels that go by the rank of the score: every other image is anomalous, or the upper half."""
    rows = pq.read_table(evaluated / "evaluations/tiny/per_image.parquet").sort_by("score").to_pylist()
    upper = [number % 2 if at_chance else number >= len(rows) // 2 for number in range(len(rows))]
    labels = {row["image_id"]: "anomalous" if high else "normal" for row, high in zip(rows, upper, strict=True)}
    Path("data/features/tiny").unlink()
    shutil.copytree(tiny_features / "data/features/tiny/test", "data/features/tiny/test")
    relabel(Path("data/features/tiny/test"), labels)
    evaluate.main("tiny")
    said = " ".join(capsys.readouterr().out.split())
    page = " ".join(Path("reports/tiny/index.html").read_text(encoding="utf-8").split())
    warning = "No better than chance, as far as these images tell: the 95 % interval of image AUROC is 0."
    assert (warning in said) == at_chance
    assert ("no better than chance, as far as these" in page) == at_chance
    assert said.endswith("See reports/tiny/index.html")


@pytest.mark.usefixtures("workspace")
def test_a_line_with_masks_has_pixel_figures(evaluated: Path, tiny_features: Path, tiny_bundle: Path) -> None:
    write_masked_line(tiny_features, tiny_bundle)
    evaluate.main("masked")
    plain, masked = read_json(evaluated / "metrics/tiny.json"), read_json(Path("metrics/masked.json"))
    pixel_figures = {"pixel_auroc", "pixel_ap", "pixel_aupro_30", "pixel_aupro_05"}
    assert {key for key in KEYS if plain[key] != masked[key]} == pixel_figures
    assert all(0 < masked[key] < 1 for key in pixel_figures)
    page = Path("reports/masked/index.html").read_text(encoding="utf-8")
    assert "32 × 32 pixels" in page
    assert "A green line is the outline" in page


@pytest.mark.usefixtures("workspace")
def test_features_of_another_backbone_are_refused(tiny_features: Path) -> None:
    Path("data/features/tiny").unlink()
    shutil.copytree(tiny_features / "data/features/tiny/test", "data/features/tiny/test")
    header = read_json(Path("data/features/tiny/test/index.json"))
    write_json(Path("data/features/tiny/test/index.json"), header | {"backbone_digest": "0" * 64})
    with pytest.raises(WTFlowError, match=r"data/features/tiny/test: features of backbone 000000000000.*dvc repro"):
        evaluate.main("tiny")


@pytest.mark.usefixtures("workspace")
def test_nothing_is_written_when_a_photograph_was_changed(tiny_features: Path) -> None:
    Path("data/raw/tiny").unlink()
    shutil.copytree(tiny_features / "data/raw/tiny", "data/raw/tiny")
    for image in Path("data/raw/tiny/images").iterdir():
        image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(DigestError, match="not the image that was scored"):
        evaluate.main("tiny")
    assert not any(Path(output.format("tiny")).exists() for output in OUTPUTS)


@pytest.mark.usefixtures("workspace")
def test_a_missing_bundle_is_named() -> None:
    Path("models/tiny").unlink()
    with pytest.raises(WTFlowError, match=r"models/tiny/bundle\.json"):
        evaluate.main("tiny")


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    "settings", ["{resolution: [64], gallery: 1}", "{resolution: [0, 64], gallery: 1}", "{gallery: 1}"]
)
def test_settings_are_checked(settings: str) -> None:
    Path("params.yaml").write_text(PARAMS.partition("evaluate:\n")[0] + f"evaluate: {settings}\n")
    with pytest.raises(WTFlowError, match=r"evaluate.*resolution"):
        evaluate.main("tiny")
