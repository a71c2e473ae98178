from typing import Any

import numpy as np
import pytest
from PIL import Image

from wtflow.features.augment import AugmentParams, source_of, varied, with_copies

ROWS: list[dict[str, Any]] = [
    {"image_id": image_id, "path": f"{image_id}.png", "split": split, "group": image_id}
    for image_id, split in (("aa", "train"), ("bb", "calibrate"), ("cc", "train"))
]
SMALL = AugmentParams(below=3, copies=2)


def picture(mode: str = "L") -> Image.Image:
    """A dark disc, right of the middle, on a bright ground."""
    down, across = np.mgrid[:60, :80]
    grey = np.where((down - 30) ** 2 + (across - 50) ** 2 < 100, 40, 200).astype(np.uint8)
    return Image.fromarray(grey).convert(mode)


def middle(image: Image.Image) -> np.ndarray:
    """Of the disc: down, across."""
    dark = 200 - np.asarray(image.convert("L"), dtype=np.float64).clip(max=200)
    return np.array([(dark * places).sum() / dark.sum() for places in np.indices(dark.shape)])


def test_training_images_of_a_small_line_get_copies_beside_them() -> None:
    rows = with_copies(ROWS, SMALL)
    assert [source_of(row["image_id"]) for row in rows] == ["aa", "aa", "aa", "bb", "cc", "cc", "cc"]
    assert [row["split"] for row in rows] == ["train", "copy", "copy", "calibrate", "train", "copy", "copy"]
    assert len({row["image_id"] for row in rows}) == 7
    assert all(row["path"] == f"{source_of(row['image_id'])}.png" for row in rows)


@pytest.mark.parametrize("below", [0, 2])
def test_a_line_that_is_not_small_gets_none(below: int) -> None:
    assert with_copies(ROWS, AugmentParams(below=below)) == ROWS


def test_another_departure_is_another_copy_and_another_count_is_not() -> None:
    ids = {row["image_id"] for row in with_copies(ROWS, SMALL)}
    assert ids < {row["image_id"] for row in with_copies(ROWS, SMALL.model_copy(update={"copies": 5}))}
    turned = with_copies(ROWS, SMALL.model_copy(update={"turn": 2.0}))
    assert {row["image_id"] for row in turned} & ids == {"aa", "bb", "cc"}


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_copy_is_the_photograph_a_little_elsewhere(mode: str) -> None:
    """The same picture each time, another for each copy, and no farther away than was allowed."""
    params = AugmentParams(below=9, copies=20, shift=0.05, turn=0.0, scale=0.0)
    original = picture(mode)
    moved = []
    for row in with_copies(ROWS[:1], params):
        copy = varied(original, row, params)
        assert copy.tobytes() == varied(original, row, params).tobytes()
        assert (copy.size, copy.mode) == (original.size, mode)
        moved.append(middle(copy) - middle(original))
    assert np.allclose(moved[0], 0)  # the photograph itself
    away = np.abs(moved[1:])
    assert (away.max(axis=0) <= [0.05 * 60 + 0.1, 0.05 * 80 + 0.1]).all()
    assert (away.max(axis=0) > [0.03 * 60, 0.03 * 80]).all()
    assert len(np.unique(np.round(moved, 2), axis=0)) == 21


def test_turns_and_scales_keep_the_middle_and_leave_no_black_corner() -> None:
    params = AugmentParams(below=9, copies=20, shift=0.1, turn=45.0, scale=0.1)
    ground = Image.new("L", (80, 60), 200)
    assert {varied(ground, row, params).getextrema() for row in with_copies(ROWS[:1], params)} == {(200, 200)}
    still = params.model_copy(update={"shift": 0.0})
    away = [middle(varied(picture(), row, still)) - (29.5, 39.5) for row in with_copies(ROWS[:1], still)]
    assert np.ptp(np.linalg.norm(away, axis=1)) < 0.11 * 2 * 10.5 + 0.5  # 10.5 pixels from the middle, scaled
