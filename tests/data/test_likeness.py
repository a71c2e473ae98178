from io import BytesIO
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from tests.data.data_sets import photographs
from tests.data.raw_folders import encoded
from wtflow.data import likeness
from wtflow.data.likeness import near_duplicates, thumbnail

PICTURES = list(islice(photographs(side=300), 60))
SPLITS = ["train"] * 30 + ["calibrate"] * 15 + ["test"] * 15


def saved(picture: Image.Image, file_format: str, **options: int) -> Image.Image:
    """What another programme would read back."""
    return Image.open(BytesIO(encoded(picture, file_format, **options))).convert("RGB")


def again(picture: Image.Image, how: str) -> Image.Image:
    match how:
        case "jpeg":
            return saved(picture, "JPEG", quality=60)
        case "twice the size":
            return picture.resize((600, 600), Image.Resampling.BICUBIC)
        case "brighter":
            return picture.point(lambda level: min(255, level + 8))
    return saved(picture, "PNG")


@pytest.mark.parametrize("how", ["png", "jpeg", "twice the size", "brighter"])
def test_the_same_photograph_saved_again_is_found_in_another_split(how: str) -> None:
    pictures = [*PICTURES, again(PICTURES[3], how), again(PICTURES[33], how)]
    found = near_duplicates([thumbnail(picture) for picture in pictures], [*SPLITS, "test", "test"])
    assert {(pair.image, pair.other) for pair in found} >= {(60, 3), (61, 33)}
    assert all(0.99 <= pair.likeness < 1.001 for pair in found)


def test_other_photographs_of_the_same_kind_of_part_are_not_taken_for_copies() -> None:
    assert near_duplicates([thumbnail(picture) for picture in PICTURES], SPLITS) == []


def test_copies_within_a_split_are_no_leak() -> None:
    pictures = [*PICTURES, again(PICTURES[3], "jpeg")]
    assert near_duplicates([thumbnail(picture) for picture in pictures], [*SPLITS, "train"]) == []


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [*PICTURES, *(again(picture, "jpeg") for picture in PICTURES[:20])]
    thumbnails, splits = [thumbnail(picture) for picture in pictures], [*SPLITS, *["test"] * 20]
    whole = near_duplicates(thumbnails, splits)
    monkeypatch.setattr(likeness, "BLOCK", 7)
    in_blocks = near_duplicates(thumbnails, splits)
    assert [(one.image, one.other) for one in in_blocks] == [(one.image, one.other) for one in whole]
    np.testing.assert_allclose([one.likeness for one in in_blocks], [one.likeness for one in whole], rtol=1e-5)
    assert len(whole) > 10


def test_the_first_look_misses_no_pair() -> None:
    """Against every cosine by itself: pictures, copies that are more and more alike, and noise."""
    rng = np.random.default_rng(0)
    base = np.stack([thumbnail(picture) for picture in PICTURES]).astype(float)
    shifted = [np.clip(base + rng.normal(0, noise, base.shape), 0, 255) for noise in (1, 3, 6, 12)]
    thumbnails = list(np.concatenate([base, *shifted, rng.uniform(0, 255, base.shape)]).astype(np.uint8))
    splits = [("train", "calibrate", "test")[(number + number // len(base)) % 3] for number in range(len(thumbnails))]
    prints_ND = likeness._fingerprints(np.stack(thumbnails))
    wanted = {}
    for image, split in enumerate(splits):
        earlier = [
            one for one, other in enumerate(splits) if likeness.SPLITS.index(other) < likeness.SPLITS.index(split)
        ]
        cosines = prints_ND[earlier] @ prints_ND[image]
        if earlier and cosines.max() >= likeness.NEAR:
            wanted[image] = earlier[int(cosines.argmax())]
    assert {pair.image: pair.other for pair in near_duplicates(thumbnails, splits)} == wanted
    assert 20 < len(wanted) < 200


def test_pictures_of_nothing_are_like_nothing() -> None:
    blank = thumbnail(Image.new("RGB", (64, 64), (9, 9, 9)))
    assert near_duplicates([blank] * 3, ["train", "calibrate", "test"]) == []
    assert near_duplicates([], []) == []
