from pathlib import Path

import pytest

from tests.data.raw_folders import fill, params
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
