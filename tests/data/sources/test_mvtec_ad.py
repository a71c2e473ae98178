import os
from collections import Counter
from pathlib import Path

import pytest

from tests.data.raw_folders import fill, params
from wtflow.data.manifest import PrepareParams
from wtflow.data.prepare import prepare
from wtflow.data.sources import mvtec_ad
from wtflow.errors import WTFlowError

MVTEC = params(layout="mvtec_ad")


def test_split_label_defect_and_mask(tmp_path: Path) -> None:
    fill(tmp_path, ["train/good/000.png", "test/good/000.png", "test/crack/000.jpg", "test/dent/000.png"])
    fill(tmp_path, ["ground_truth/crack/000_mask.png", "readme.txt", "train/good/.DS_Store"])
    found = {
        image.path: (image.split, image.label, image.defect, image.mask_path)
        for image in mvtec_ad.images(tmp_path, MVTEC)
    }
    assert found == {
        "train/good/000.png": ("train", "normal", "", None),
        "test/good/000.png": ("test", "normal", "", None),
        "test/crack/000.jpg": ("test", "anomalous", "crack", "ground_truth/crack/000_mask.png"),
        "test/dent/000.png": ("test", "anomalous", "dent", None),
    }


def test_without_a_pattern_equal_names_are_different_groups(tmp_path: Path) -> None:
    fill(tmp_path, ["train/good/000.png", "test/good/000.png"])
    assert len({image.group for image in mvtec_ad.images(tmp_path, MVTEC)}) == 2


def test_the_pattern_names_the_group(tmp_path: Path) -> None:
    fill(tmp_path, ["train/good/view01_exp1.png", "train/good/view01_exp2.png", "test/good/other.png"])
    settings = params(layout="mvtec_ad", group_pattern=r"(view\d+)")
    assert [image.group for image in mvtec_ad.images(tmp_path, settings)] == ["", "view01", "view01"]


@pytest.mark.parametrize("missing", ["train/good", "test"])
def test_a_missing_folder_is_named(tmp_path: Path, missing: str) -> None:
    for name in {"train/good", "test"} - {missing}:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(WTFlowError, match=f"no folder {missing}/"):
        list(mvtec_ad.images(tmp_path, MVTEC))


@pytest.mark.slow
def test_magnetic_tile() -> None:
    shared = os.environ.get("WTFLOW_SHARED_DATA")
    if not shared:
        pytest.skip("WTFLOW_SHARED_DATA is not set: magnetic_tile cannot be read")
    settings = {
        "layout": "mvtec_ad",
        "test_fraction": 0.25,
        "calibrate_fraction": 0.15,
        "salt": "wtflow",
        "group_block": 1,
        "group_pattern": r"(view\d+)",
        "max_rejected_fraction": 0.0,
    }
    prepared = prepare(Path(shared) / "magnetic_tile", "magnetic-tile", PrepareParams.parse(settings, where="test"))
    rows = prepared.manifest.rows()
    normals = Counter(row["split"] for row in rows if row["label"] == "normal")
    assert normals == {"train": 620, "calibrate": 69, "test": 263}
    defects = Counter(row["defect"] for row in rows if row["label"] == "anomalous")
    assert defects == {"blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
    assert all((row["mask_path"] is not None) == (row["label"] == "anomalous") for row in rows)
    assert prepared.rejected.num_rows == 0
