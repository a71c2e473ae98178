import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml

from pipelines import provenance, reproduce
from pipelines.evaluate import PER_IMAGE_SCHEMA
from tests.data import data_sets
from tests.data.raw_folders import params
from wtflow.artefact import save_tensors, sha256_file, write_json
from wtflow.data.prepare import prepare
from wtflow.errors import WTFlowError

REPOSITORY = Path(__file__).parents[2]
PRESET: dict[str, Any] = {
    "extract": {"backbone": {"name": "tf_efficientnet_lite0", "levels": [2, 3], "image_size": [64, 64]}},
    "train": {
        "epochs": 2,
        "batches": {"kind": "images"},
        "fusion": {"levels": [2, 3], "stride": 8, "norm": "channel"},
        "velocity": {"kind": "unet", "width": 8},
    },
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("WTFLOW_WORK", str(tmp_path / "work"))


def preset(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "presets/tiny.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(PRESET | changes))
    return str(path)


def tree(tmp_path: Path, data_set: str, *names: str) -> Path:
    """A data set in miniature."""
    root = tmp_path / "data set"
    for number, name in enumerate(names):
        data_sets.DATA_SETS[data_set](root / name, 60 * number, 24)
    (root / "license.txt").write_text("a licence")
    return root


class Stages:
    """Leaves of each stage no more than the table needs, and notes what was run."""

    def __init__(self, **image_aurocs: float) -> None:
        self.image_aurocs = image_aurocs
        self.ran: list[tuple[str, str]] = []
        self.failing: set[tuple[str, str]] = set()

    def __call__(self, place: Path, stage: str, line: str) -> bool:
        self.ran.append((stage, line))
        if (stage, line) in self.failing:
            return False
        if stage == "evaluate":
            write_json(place / f"metrics/{line}.json", {"image_auroc": self.image_aurocs[line], "pixel_auroc": 0.97})
        return True


def table(tmp_path: Path, data_set: str) -> Any:
    return json.loads((tmp_path / f"work/reproduce/{data_set}-tiny/table.json").read_text())


def test_a_line_a_category_the_means_and_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, stages = tree(tmp_path, "mpdd", "bracket_black", "tubes"), Stages(**{"bracket-black": 0.9, "tubes": 0.96})
    assert reproduce.main("mpdd", root, preset(tmp_path), stages)
    assert stages.ran == [(stage, line) for line in ("bracket-black", "tubes") for stage in reproduce.STAGES]
    found = table(tmp_path, "mpdd")
    assert found["categories"]["tubes"] == {"image_auroc": 96.0, "pixel_auroc": 97.0}
    assert found["mean"] == pytest.approx({"image_auroc": 93.0, "pixel_auroc": 97.0})
    assert found["difference"] == pytest.approx({"image_auroc": 93.0 - 98.3, "pixel_auroc": 97.0 - 94.2})
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("mean of 2", "paper", "98.30", "-5.30", "+2.80"))


def test_what_is_done_is_not_done_again_and_what_changed_is(tmp_path: Path) -> None:
    root, stages = tree(tmp_path, "mvtec_ad", "bottle", "cable"), Stages(bottle=0.9, cable=0.8)
    stages.failing = {("train", "bottle")}
    assert not reproduce.main("mvtec_ad", root, preset(tmp_path), stages)
    assert table(tmp_path, "mvtec_ad")["failed"] == {"bottle": "train"}
    assert table(tmp_path, "mvtec_ad")["mean"]["image_auroc"] == pytest.approx(80.0)
    stages.failing, stages.ran = set(), []
    assert reproduce.main("mvtec_ad", root, preset(tmp_path), stages)
    assert stages.ran == [("train", "bottle"), ("evaluate", "bottle")]
    stages.ran = []
    assert reproduce.main("mvtec_ad", root, preset(tmp_path), stages)
    assert stages.ran == []
    reproduce.main("mvtec_ad", root, preset(tmp_path, train=PRESET["train"] | {"epochs": 3}), stages)
    assert stages.ran == [(stage, line) for line in ("bottle", "cable") for stage in ("train", "evaluate")]


def test_a_stage_that_wrote_and_failed_is_done_again_with_the_settings_of_before(tmp_path: Path) -> None:
    root, stages = tree(tmp_path, "mvtec_ad", "bottle"), Stages(bottle=0.9)
    reproduce.main("mvtec_ad", root, preset(tmp_path), stages)
    stages.failing, stages.ran = {("train", "bottle")}, []
    assert not reproduce.main("mvtec_ad", root, preset(tmp_path, train=PRESET["train"] | {"epochs": 3}), stages)
    assert stages.ran == [("train", "bottle")]
    stages.failing, stages.ran = set(), []
    assert reproduce.main("mvtec_ad", root, preset(tmp_path), stages)
    assert stages.ran == [("train", "bottle"), ("evaluate", "bottle")]


def test_other_images_are_done_anew(tmp_path: Path) -> None:
    mini, full = (tree(tmp_path / name, "mvtec_ad", "bottle") for name in ("mini", "full"))
    stages = Stages(bottle=0.9)
    every = [(stage, "bottle") for stage in reproduce.STAGES]
    reproduce.main("mvtec_ad", mini, preset(tmp_path), stages)
    reproduce.main("mvtec_ad", full, preset(tmp_path), stages)
    assert stages.ran == 2 * every
    assert (tmp_path / "work/reproduce/mvtec_ad-tiny/data/raw/bottle").resolve() == (full / "bottle").resolve()
    (full / "bottle/train/good/more.png").write_bytes(b"another image")
    stages.ran = []
    for _ in range(2):
        reproduce.main("mvtec_ad", full, preset(tmp_path), stages)
    assert stages.ran == every


def test_other_code_is_run_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, stages = tree(tmp_path, "mvtec_ad", "bottle"), Stages(bottle=0.9)
    reproduce.main("mvtec_ad", root, preset(tmp_path), stages)
    stages.ran = []
    changed = Path("pipelines/evaluate.py")
    monkeypatch.setattr(
        provenance, "sha256_file", lambda path: "other" if path.match(str(changed)) else sha256_file(path)
    )
    reproduce.main("mvtec_ad", root, preset(tmp_path), stages)
    assert stages.ran == [("evaluate", "bottle")]


def test_the_copy_of_a_visa_object_follows_its_source(tmp_path: Path) -> None:
    mini, full = (tree(tmp_path / name, "visa", "candle") for name in ("mini", "full"))
    (full / "candle/Data/Images/Normal/more.JPG").write_bytes(b"another image")
    raw = tmp_path / "raw/candle"
    reproduce.bring(mini / "candle", raw)
    assert not raw.is_symlink()
    before = raw.stat().st_ino
    reproduce.bring(mini / "candle", raw)
    assert raw.stat().st_ino == before
    reproduce.bring(full / "candle", raw)
    assert (raw / "Data/Images/Normal/more.JPG").exists()
    (full / "split_csv/1cls.csv").write_text("object,split,label,image,mask\n")
    reproduce.bring(full / "candle", raw)
    assert (raw / "split_csv/1cls.csv").read_text() == "object,split,label,image,mask\n"
    reproduce.bring(tree(tmp_path, "mvtec_ad", "bottle") / "bottle", raw)
    assert raw.is_symlink()


def test_the_project_has_the_preset_in_its_own_params(tmp_path: Path) -> None:
    reproduce.main("mvtec_ad", tree(tmp_path, "mvtec_ad", "bottle"), preset(tmp_path), Stages(bottle=1.0))
    written = yaml.safe_load((tmp_path / "work/reproduce/mvtec_ad-tiny/params.yaml").read_text())
    assert list(written["lines"]) == ["bottle"]
    assert written["prepare"]["layout"] == "mvtec_ad"
    assert written["train"]["epochs"] == 2
    assert written["train"]["calibration"]["target_fpr"] == 0.2
    assert written["evaluate"] == yaml.safe_load((REPOSITORY / "params.yaml").read_text())["evaluate"]


@pytest.mark.parametrize("data_set", data_sets.DATA_SETS)
def test_every_data_set_can_be_prepared_from_where_it_lies(tmp_path: Path, data_set: str) -> None:
    root = tree(tmp_path, data_set, "Category_1", "category_2")
    found = reproduce.categories(root)
    assert list(found) == ["category-1", "category-2"]
    for line, folder in found.items():
        for _ in range(2):  # a second run finds what the first one made
            reproduce.bring(folder, tmp_path / "raw" / line)
        made = prepare(tmp_path / "raw" / line, line, params(layout=data_set, max_rejected_fraction=0.0))
        assert len(made.manifest.rows()) >= 31


def test_the_image_auroc_of_loco_is_the_mean_over_both_kinds(tmp_path: Path) -> None:
    place = tmp_path / "place"
    scores = [("normal", "", 0.1), ("normal", "", 0.3), ("anomalous", "logical_anomalies", 0.2)]
    scores += [("anomalous", "structural_anomalies", 0.9)] * 3
    rows = [
        dict.fromkeys(PER_IMAGE_SCHEMA.names) | {"label": label, "defect": defect, "score": score}
        for label, defect, score in scores
    ]
    (place / "evaluations/box").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=PER_IMAGE_SCHEMA), place / "evaluations/box/per_image.parquet")
    write_json(place / "metrics/box.json", {"image_auroc": 0.875, "pixel_auroc": None})
    assert reproduce.figures(place, "box", "mvtec_loco") == (75.0, None)
    assert reproduce.figures(place, "box", "mvtec_ad") == (87.5, None)


def test_a_mistake_says_what_there_is(tmp_path: Path) -> None:
    root = tree(tmp_path, "mvtec_ad", "bottle")
    for arguments, message in (
        (("mvtec", root, "paper"), "DATASET: 'mvtec' is none of mvtec_ad, visa"),
        (("mvtec_ad", tmp_path / "nowhere", "paper"), "is no folder"),
        (("mvtec_ad", root / "bottle" / "train", "paper"), "holds no category"),
        (("mvtec_ad", root, "papper"), "PRESET: 'papper' is none of default, "),
    ):
        with pytest.raises(WTFlowError, match=message):
            reproduce.main(*arguments, Stages())


def test_two_categories_of_one_name_and_one_without_are_refused(tmp_path: Path) -> None:
    for name, message in (("metal-nut", "would both be the line metal-nut"), ("___", "gives no name of a line")):
        root = tree(tmp_path / name, "mvtec_ad", "metal_nut", name)
        with pytest.raises(WTFlowError, match=message):
            reproduce.main("mvtec_ad", root, "paper", Stages())


def test_a_preset_is_read_from_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("lines: {}")
    (tmp_path / "mine.yaml").write_text("train: {learning_rate: 1e-3}")
    assert reproduce.preset_of(str(tmp_path / "mine.yaml")) == ({"train": {"learning_rate": 0.001}}, "mine")


@pytest.mark.slow
def test_a_miniature_data_set_from_its_folder_to_the_table(tmp_path: Path) -> None:
    """With random weights, killed in the midst, and gone on with."""
    root = tree(tmp_path, "mvtec_loco", "breakfast_box", "pushpins")
    torch.manual_seed(0)
    save_tensors(tmp_path / "random.safetensors", timm.create_model("tf_efficientnet_lite0").state_dict())
    chosen = {"weights": str(tmp_path / "random.safetensors"), "sha256": sha256_file(tmp_path / "random.safetensors")}
    extract = {"backbone": PRESET["extract"]["backbone"] | chosen}
    command = [sys.executable, "-m", "pipelines.reproduce", "mvtec_loco", str(root)]
    command += ["--preset", preset(tmp_path, extract=extract)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WTFLOW_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    place = tmp_path / "work/reproduce/mvtec_loco-tiny"
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    while first.poll() is None and not (place / "data/prepared/pushpins").exists():
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    before = (place / "models/breakfast-box/bundle.json").stat().st_mtime_ns
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert (place / "models/breakfast-box/bundle.json").stat().st_mtime_ns == before
    found = table(tmp_path, "mvtec_loco")
    assert list(found["categories"]) == ["breakfast-box", "pushpins"]
    assert 0 <= found["mean"]["image_auroc"] <= 100
    assert found["difference"]["image_auroc"] == pytest.approx(found["mean"]["image_auroc"] - 87.7)
    metrics = json.loads((place / "metrics/pushpins.json").read_text())
    assert 0 <= metrics["pixel_spro_05"] <= 1
    assert metrics["n_test_anomalous"] == 6
    assert "mean of 2" in done.stdout
