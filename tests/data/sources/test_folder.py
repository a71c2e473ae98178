from collections import Counter
from pathlib import Path

import pytest

from tests.data.data_sets import bar_mask, defective, photographs
from tests.data.raw_folders import encoded, fill, params, write
from wtflow.data.prepare import prepare
from wtflow.data.sources import folder
from wtflow.errors import WTFlowError


def test_good_is_normal_and_folders_in_bad_name_defects(tmp_path: Path) -> None:
    fill(tmp_path, ["good/a.png", "good/lot1/a.png", "bad/b.png", "bad/fray/c.png", "bad/fray/deep/d.png"])
    fill(tmp_path, ["other/e.png", "good/.hidden.png", "good/.cache/f.png", "notes.txt"])
    found = {image.path: (image.label, image.defect, image.group) for image in folder.images(tmp_path, params())}
    assert found == {
        "good/a.png": ("normal", "", "good/a"),
        "good/lot1/a.png": ("normal", "", "good/lot1/a"),
        "bad/b.png": ("anomalous", "defective", "bad/b"),
        "bad/fray/c.png": ("anomalous", "fray", "bad/fray/c"),
        "bad/fray/deep/d.png": ("anomalous", "fray", "bad/fray/deep/d"),
    }
    assert {(image.split, image.mask_path) for image in folder.images(tmp_path, params())} == {(None, None)}


def test_bad_may_be_absent_and_good_may_not(tmp_path: Path) -> None:
    fill(tmp_path, ["good/lot7-1.png"])
    assert [image.group for image in folder.images(tmp_path, params(group_pattern="(lot[0-9]+)"))] == ["lot7"]
    with pytest.raises(WTFlowError, match="no folder good/"):
        list(folder.images(tmp_path / "good", params()))


def test_masks_lie_as_the_images_do_and_are_optional(tmp_path: Path) -> None:
    fill(tmp_path, ["good/a.png", "bad/b.png", "bad/fray/c.jpg", "bad/fray/d.png", "bad/e.png"])
    fill(tmp_path, ["masks/b.png", "masks/fray/c_mask.png", "masks/fray/x.png"])
    found = {image.path: image.mask_path for image in folder.images(tmp_path, params())}
    assert found == {
        "good/a.png": None,
        "bad/b.png": "masks/b.png",
        "bad/e.png": None,
        "bad/fray/c.jpg": "masks/fray/c_mask.png",
        "bad/fray/d.png": None,
    }


def test_a_photograph_whose_mask_could_not_be_named_has_none(tmp_path: Path) -> None:
    name = "x" * 248  # with _mask.png longer than a name may be
    fill(tmp_path, ["good/a.png", f"bad/fray/{name}.png"])
    (tmp_path / "masks/fray").mkdir(parents=True)
    assert [image.mask_path for image in folder.images(tmp_path, params())] == [None, None]


def test_what_was_found_in_place_of_good_is_told(tmp_path: Path) -> None:
    fill(tmp_path, ["Good/a.png", "Riss/b.png", ".cache/c.png"])
    with pytest.raises(WTFlowError, match=r"no folder good/, .*; found: Good/, Riss/\. "):
        list(folder.images(tmp_path, params()))
    fill(tmp_path / "flat", ["a.png", "b.JPG", "notes.txt"])
    with pytest.raises(WTFlowError, match=r"found: 2 image files that lie flat\. "):
        list(folder.images(tmp_path / "flat", params()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WTFlowError, match=r"found: nothing of use\. "):
        list(folder.images(tmp_path / "empty", params()))


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("masks/Riss/0.png", "lies among the masks, but there is no photograph bad/Riss/0.* for it"),
        ("masks/Riss/0_mask.png", "lies among the masks, but there is no photograph bad/Riss/0.* for it"),
        ("masks/Riss quer/0.bmp", "a mask has to be a PNG file whose name ends in .png"),
        ("masks/Riss quer/0_mask.PNG", "a mask has to be a PNG file whose name ends in .png"),
        (
            "masks/Riss/0.bmp",
            "lies among the masks, but there is no photograph bad/Riss/0.* for it; "
            "a mask has to be a PNG file whose name ends in .png",
        ),
        ("masks/1.png", "lies among the masks, but there is no photograph bad/1.* for it"),
        ("Riss/0.png", "defects belong below bad/: if Riss/ is one, move it to bad/Riss/"),
        ("Bad/Riss/0.png", "the folder Bad/ has to be named bad/"),
        ("flat.png", "lies flat: photographs belong below good/, those with a defect below bad/"),
    ],
)
def test_an_image_in_no_known_place_is_told_where_it_belongs(path: str, detail: str, tmp_path: Path) -> None:
    fill(tmp_path, [*(f"good/{number:02d}.png" for number in range(30)), "bad/Riss quer/0.png"])
    fill(tmp_path, [path], first_seed=100)
    (row,) = prepare(tmp_path, "tiles", params()).rejected.to_pylist()
    assert (row["path"], row["reason"], row["detail"]) == (path, "not_in_layout", detail)


def test_a_second_mask_of_a_photograph_has_no_meaning(tmp_path: Path) -> None:
    fill(tmp_path, ["good/a.png", "bad/b.png", "masks/b.png", "masks/b_mask.png"])
    assert folder.stray(tmp_path, "masks/b_mask.png") is None


def test_real_photographs_in_a_folder_with_and_without_defects(tmp_path: Path) -> None:
    pictures = photographs()
    for number in range(30):
        write(tmp_path / f"good/teil {number:02d} größe.png", encoded(next(pictures)))
    alone = prepare(tmp_path, "cells", params())
    assert Counter(row["label"] for row in alone.manifest.rows()) == {"normal": 30}
    for number in range(3):
        write(tmp_path / f"bad/{number}.jpg", encoded(defective(next(pictures)), "JPEG"))
    write(tmp_path / "masks/0.png", bar_mask())
    write(tmp_path / "masks/1.png", bar_mask(0))
    prepared = prepare(tmp_path, "cells", params())
    assert prepared.rejected.num_rows == 0
    assert Counter(row["label"] for row in prepared.manifest.rows()) == {"normal": 30, "anomalous": 3}
    findings = {row["path"]: row["finding"] for row in prepared.findings.to_pylist()}
    assert findings == {"bad/1.jpg": "empty_mask", "bad/2.jpg": "no_mask"}
