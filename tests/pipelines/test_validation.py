import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines import validation
from pipelines.search_space import LabelledImages, SyntheticDefects
from pipelines.validation import Validation, held_out, judged_features
from tests.pipelines.searches import TUNE, write_project
from tests.tiny_line import train_params, trained
from wtflow.data.manifest import Manifest
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.scoring.metrics import auroc

SYNTHETIC = SyntheticDefects.parse(TUNE["objective"], "tests")
FIT = Path("data/features/tiny/fit")


@pytest.fixture
def project(tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_project(tiny_features, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("project")
def test_whole_groups_of_train_are_held_out_and_calibrate_is_left_alone(tiny_fit: FeatureShards) -> None:
    view = held_out(tiny_fit, SYNTHETIC)
    before, after = tiny_fit.index.to_pylist(), view.index.to_pylist()
    assert [row["image_id"] for row in before] == [row["image_id"] for row in after]
    groups = {
        split: {row["group"] for row in after if row["split"] == split} for split in ("train", "calibrate", "validate")
    }
    assert groups["train"]
    assert groups["validate"]
    assert not groups["train"] & groups["validate"]
    assert view.rows(split="calibrate") == tiny_fit.rows(split="calibrate")
    assert sorted(view.rows(split="train") + view.rows(split="validate")) == tiny_fit.rows(split="train")
    share = len(groups["validate"]) / (len(groups["train"]) + len(groups["validate"]))
    assert share == pytest.approx(SYNTHETIC.share, abs=0.1)
    other = held_out(tiny_fit, SYNTHETIC.model_copy(update={"seed": 1}))
    assert other.rows(split="validate") != view.rows(split="validate")
    calibrate = SYNTHETIC.model_copy(update={"normals": "calibrate"})
    assert held_out(tiny_fit, calibrate).index.equals(tiny_fit.index)


def test_copies_of_what_is_held_out_serve_for_nothing(tiny_fit: FeatureShards) -> None:
    rows = tiny_fit.index.to_pylist()
    copied = [{**row, "image_id": f"{row['image_id']}~1", "split": "copy"} for row in rows if row["split"] == "train"]
    both = replace(tiny_fit, index=pa.Table.from_pylist([*rows, *copied], schema=tiny_fit.index.schema))
    view = held_out(both, SYNTHETIC)
    after = view.index.to_pylist()
    assert {row["group"] for row in after if row["split"] == "copy"} == {
        row["group"] for row in after if row["split"] == "train"
    }
    assert view.rows(split="validate") == held_out(tiny_fit, SYNTHETIC).rows(split="validate")
    assert len(view.training_rows()) == 2 * len(view.rows(split="train"))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("normals", ["train", "calibrate"])
def test_the_criterion_is_the_mean_auroc_over_the_kinds(normals: str, tmp_path: Path) -> None:
    objective = SYNTHETIC.model_copy(update={"normals": normals})
    folder = judged_features("tiny", objective, tmp_path / "work")
    found = Validation.open(FIT, folder, objective)
    assert {kind: len(sample.rows) for kind, sample in found.anomalous.items()} == dict.fromkeys(
        SYNTHETIC.defects, len(found.normal.rows)
    )
    ids = {found.fit.index["image_id"][row].as_py() for row in found.normal.rows}
    assert not ids & {found.fit.index["image_id"][row].as_py() for row in found.fit.rows(split="train")}
    scorer = trained(found.fit, train_params()).scorer
    figures = found.criterion(scorer)
    normal = found.normal.scores(scorer)
    wanted = {f"auroc/{kind}": auroc(normal, sample.scores(scorer)) for kind, sample in found.anomalous.items()}
    assert figures == {**wanted, "score": pytest.approx(np.mean(list(wanted.values())))}
    assert figures["auroc/noise"] > 0.6  # the defects can be seen


def test_nothing_goes_through_the_backbone_twice(project: Path) -> None:
    folder = judged_features("tiny", SYNTHETIC, project / "work")
    stamps = {path: path.stat().st_mtime_ns for path in (project / "work").rglob("*") if path.is_file()}
    assert judged_features("tiny", SYNTHETIC, project / "work") == folder
    assert {path: path.stat().st_mtime_ns for path in (project / "work").rglob("*") if path.is_file()} == stamps
    more = SYNTHETIC.model_copy(update={"defects": ("blur",)})
    assert judged_features("tiny", more, project / "work") != folder


def test_two_searches_at_once_make_their_features_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract, calls = validation.extract, list[Path]()

    def slow(rows: Any, folder: Path, *more: Any) -> Any:
        calls.append(folder)
        time.sleep(0.5)
        return extract(rows, folder, *more)

    monkeypatch.setattr(validation, "extract", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: judged_features("tiny", SYNTHETIC, project / "work"), range(2))
    assert first == second
    assert len(calls) == 1
    FeatureShards.open(first)


def test_damaged_features_of_a_search_are_made_again(project: Path) -> None:
    folder = judged_features("tiny", SYNTHETIC, project / "work")
    digest = FeatureShards.open(folder).digest
    (folder / "part-00000.safetensors").unlink()
    (folder / "part-00000.safetensors").write_bytes(b"half")
    assert judged_features("tiny", SYNTHETIC, project / "work") == folder
    assert FeatureShards.open(folder).digest == digest


def test_features_of_a_backbone_that_this_version_does_not_compute_are_refused(
    tiny_features: Path, project: Path
) -> None:
    place = project / "copy"
    shutil.copytree(tiny_features / "data", place / "data")
    header = place / FIT / "index.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "backbone_digest": "0" * 64}))
    with pytest.raises(WTFlowError, match=r"fit/index\.json: backbone_digest is not .*dvc repro --force extract@tiny"):
        judged_features("tiny", SYNTHETIC, project / "work", place)


def test_damaged_copies_are_named_by_the_code_that_made_them(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged_features("tiny", SYNTHETIC, project / "work")
    (project / "images.py").write_text("# another way to decode")
    monkeypatch.setattr(validation.images, "__file__", str(project / "images.py"))
    judged_features("tiny", SYNTHETIC, project / "work")
    assert len([*(project / "work/tiny").glob("damaged-*")]) == 2


def _folder(root: Path) -> LabelledImages:
    generator = np.random.default_rng(0)
    for label, count in (("normal", 3), ("anomalous", 2)):
        (root / "mine" / label).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "mine" / label / f"{number}.png")
    return LabelledImages(kind="labelled", folder=str(root / "mine"))


def test_labelled_images_of_ones_own(project: Path) -> None:
    objective = _folder(project)
    found = Validation.open(FIT, judged_features("tiny", objective, project / "work"), objective)
    assert (len(found.normal.rows), len(found.anomalous["labelled"].rows)) == (3, 2)
    assert found.fit.rows(split="train") == FeatureShards.open(FIT).rows(split="train")
    figures = found.criterion(trained(found.fit, train_params(epochs=1)).scorer)
    assert figures["score"] == figures["auroc/labelled"]


@pytest.mark.parametrize("split", ["train", "calibrate", "test"])
def test_images_of_the_line_are_refused(project: Path, split: str) -> None:
    objective = _folder(project)
    row = Manifest.read(Path("data/prepared/tiny/manifest.parquet")).rows(split)[0]  # type: ignore[arg-type]
    shutil.copy(Path("data/raw/tiny") / row["path"], project / "mine/normal/taken.png")
    with pytest.raises(WTFlowError, match=f"taken.png: is in the split `{split}` of tiny already"):
        judged_features("tiny", objective, project / "work")


def test_a_folder_without_images_is_named(project: Path) -> None:
    objective = _folder(project)
    shutil.rmtree(project / "mine/anomalous")
    with pytest.raises(WTFlowError, match=r"mine/anomalous holds no image"):
        judged_features("tiny", objective, project / "work")
