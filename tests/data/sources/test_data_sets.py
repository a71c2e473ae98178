"""Each benchmark data set, in a tree of the shape in which it is handed out."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data import data_sets
from tests.data.raw_folders import encoded, noise, params, write
from wtflow.data.prepare import Prepared, prepare
from wtflow.data.sources import mpdd, mvtec_ad_2, mvtec_loco, visa
from wtflow.errors import WTFlowError


def raw_folder(tmp_path: Path, layout: str) -> Path:
    """A category of the data set, as its line's raw folder."""
    raw = tmp_path / "candle"
    data_sets.DATA_SETS[layout](raw, 0, 24)
    if layout == "visa":
        shutil.copytree(tmp_path / "split_csv", raw / "split_csv")
    return raw


def prepared(tmp_path: Path, layout: str, **changes: Any) -> Prepared:
    return prepare(raw_folder(tmp_path, layout), "line", params(layout=layout, max_rejected_fraction=0.0, **changes))


def rows(found: Prepared) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in found.manifest.rows()}


@pytest.mark.parametrize("layout", data_sets.DATA_SETS)
def test_every_image_has_its_place_and_nothing_is_left_over(tmp_path: Path, layout: str) -> None:
    found = prepared(tmp_path, layout)
    assert found.rejected.num_rows == 0
    splits = Counter(row["split"] for row in found.manifest.rows() if row["label"] == "normal")
    assert splits["test"] == 4
    assert splits["train"] + splits["calibrate"] == (24 if layout in ("mvtec_ad", "mpdd", "visa") else 30)
    anomalous = [row for row in found.manifest.rows() if row["label"] == "anomalous"]
    assert {row["split"] for row in anomalous} == {"test"}
    assert all(row["mask_path"] for row in anomalous)
    assert len(anomalous) == {"mvtec_loco": 6, "mvtec_ad_2": 4}.get(layout, 3)


@pytest.mark.parametrize("layout", ["mvtec_loco", "mvtec_3d", "mvtec_ad_2"])
def test_the_official_validation_images_calibrate_and_train_is_not_cut(tmp_path: Path, layout: str) -> None:
    found = prepared(tmp_path, layout, calibrate_fraction=0.6)
    of = {path.split("/")[0]: set() for path in rows(found)}  # type: dict[str, set[str]]
    for path, row in rows(found).items():
        of[path.split("/")[0]].add(row["split"])
    assert of["train"] == {"train"}
    assert of["validation"] == {"calibrate"}


def test_visa_keeps_its_split_defects_and_masks_of_numbers(tmp_path: Path) -> None:
    found = prepared(tmp_path, "visa")
    row = rows(found)["Data/Images/Anomaly/001.JPG"]
    assert (row["defect"], row["mask_path"]) == ("bent,melt", "Data/Masks/Anomaly/001.png")
    assert rows(found)["Data/Images/Anomaly/000.JPG"]["defect"] == "bent"
    assert {rows(found)[f"Data/Images/Normal/{number:04d}.JPG"]["split"] for number in range(24, 28)} == {"test"}
    assert found.findings.num_rows == 0  # a mask of ones and twos is not empty


def test_visa_takes_the_rows_of_its_own_object(tmp_path: Path) -> None:
    data_sets.visa(tmp_path / "pcb1", 40, 24)
    assert len(rows(prepared(tmp_path, "visa"))) == 31


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("candle,train,normal,candle/Data/Images/Normal/0000.JPG,", "candle,train,anomaly,candle/x.JPG,", "1cls.csv"),
        ("candle,train,normal,candle/", "candle,dev,normal,candle/", r"1cls\.csv:2: split dev"),
        ("candle,train,normal,candle/", "candle,train,normal,pcb1/", r"not below candle/"),
        ("candle,", "pcb1,", "no row of object candle"),
        ("object,split", "object,part", "first line has to be object,split,label,image,mask"),
    ],
)
def test_a_split_file_of_another_kind_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    raw = raw_folder(tmp_path, "visa")
    split = raw / "split_csv/1cls.csv"
    split.write_text(split.read_text().replace(old, new, -1 if old == "candle," else 1))
    with pytest.raises(WTFlowError, match=message):
        list(visa.images(raw, params(layout="visa")))


def test_visa_without_its_split_file_says_which(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, "visa")
    shutil.rmtree(raw / "split_csv")
    with pytest.raises(WTFlowError, match=r"split_csv/1cls\.csv: not there, layout visa needs it"):
        list(visa.images(raw, params(layout="visa")))


def test_a_mask_of_mpdd_may_bear_the_name_of_its_image(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, "mpdd")
    masks = [image.mask_path for image in mpdd.images(raw, params(layout="mpdd")) if image.label == "anomalous"]
    folder = "ground_truth/broken"
    assert masks == [f"{folder}/000_mask.png", f"{folder}/001.png", f"{folder}/002_mask.png"]
    (raw / folder / "001.png").unlink()
    assert (
        prepare(raw, "line", params(layout="mpdd"))
        .rejected.to_pylist()[0]["detail"]
        .startswith(f"{folder}/001_mask.png")
    )


def test_a_mask_of_mpdd_whose_name_would_be_too_long_is_missing(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, "mpdd")
    name = "x" * 248  # with _mask.png longer than a name may be
    write(raw / f"test/broken/{name}.png", encoded(noise(99)))
    (row,) = prepare(raw, "line", params(layout="mpdd")).rejected.to_pylist()
    assert (row["path"], row["reason"]) == (f"test/broken/{name}.png", "bad_mask")
    write(raw / f"ground_truth/broken/{name}.png", encoded(noise(98)))
    masks = [image.mask_path for image in mpdd.images(raw, params(layout="mpdd"))]
    assert f"ground_truth/broken/{name}.png" in masks


def test_a_mask_of_loco_is_a_folder_and_its_files_are_checked(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, "mvtec_loco")
    settings = params(layout="mvtec_loco")
    masks = {image.path: image.mask_path for image in mvtec_loco.images(raw, settings) if image.mask_path}
    assert masks["test/logical_anomalies/000.png"] == "ground_truth/logical_anomalies/000"
    shutil.rmtree(raw / "ground_truth/logical_anomalies/001")
    write(raw / "ground_truth/logical_anomalies/002/001.png", encoded(noise(3, 70, 64)))
    write(raw / "ground_truth/structural_anomalies/000/000.png", data_sets.bar_mask(level=200))
    write(raw / "ground_truth/structural_anomalies/001/000.png", data_sets.bar_mask(level=0))
    found = prepare(raw, "line", settings)
    details = {row["path"]: (row["reason"], row["detail"]) for row in found.rejected.to_pylist()}
    assert details == {
        "test/logical_anomalies/001.png": ("bad_mask", "ground_truth/logical_anomalies/001: not there"),
        "test/logical_anomalies/002.png": (
            "bad_mask",
            "ground_truth/logical_anomalies/002/001.png: 70 x 64 pixels, its image 64 x 64",
        ),
        "test/structural_anomalies/000.png": (
            "bad_mask",
            "ground_truth/structural_anomalies/000/000.png: grey level 200 is no pixel_value of defects_config.json",
        ),
    }
    assert [(row["path"], row["finding"]) for row in found.findings.to_pylist()] == [
        ("test/structural_anomalies/001.png", "empty_mask")
    ]


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (None, "not there; sPRO needs it"),
        ([{"pixel_value": 255}], "not a list of defects with pixel_value"),
        ([{"pixel_value": 255, "saturation_threshold": 3, "relative_saturation": True}], "pixel_value 255 has to be"),
        ([{"pixel_value": 255, "saturation_threshold": 0, "relative_saturation": False}], "pixel_value 255 has to be"),
    ],
)
def test_saturations_that_do_not_hold_are_named(tmp_path: Path, kinds: object, message: str) -> None:
    raw = raw_folder(tmp_path, "mvtec_loco")
    (raw / "defects_config.json").unlink() if kinds is None else write(
        raw / "defects_config.json", json.dumps(kinds).encode()
    )
    with pytest.raises(WTFlowError, match=rf"defects_config\.json: .*{message}"):
        prepare(raw, "line", params(layout="mvtec_loco"))


def test_a_scene_of_ad_2_is_one_group_under_every_light(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path, "mvtec_ad_2")
    groups = {image.path: image.group for image in mvtec_ad_2.images(raw, params(layout="mvtec_ad_2"))}
    assert groups["test_public/good/000_regular.png"] == groups["test_public/good/000_overexposed.png"]
    assert groups["test_public/good/000_regular.png"] != groups["train/good/000_regular.png"]
    lots = params(layout="mvtec_ad_2", group_pattern=r"(\d)_")
    assert {image.group for image in mvtec_ad_2.images(raw, lots)} == set("0123456789")


@pytest.mark.parametrize("layout", ["mvtec_loco", "mvtec_3d", "mvtec_ad_2", "visa", "mpdd"])
def test_a_folder_of_another_layout_is_refused(tmp_path: Path, layout: str) -> None:
    (tmp_path / "good").mkdir()
    with pytest.raises(WTFlowError, match=f"no folder .*, which layout {layout} needs"):
        prepare(tmp_path, "line", params(layout=layout))
