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
