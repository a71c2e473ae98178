import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.data.data_sets import BAR, SIDE, bar_mask
from tests.data.raw_folders import encoded, fill, write
from wtflow.data.images import ImageLimits
from wtflow.data.masks import Saturation, mask_files, read_marks, read_saturations

LIMITS = ImageLimits()
EXPECTED = np.zeros((SIDE, SIDE), dtype=bool)
EXPECTED[BAR] = True


@pytest.mark.parametrize("level", [1, 7, 127, 128, 255])
def test_black_and_white_and_numbers_of_defects_mark_alike(level: int) -> None:
    marks = read_marks(bar_mask(level), LIMITS)
    np.testing.assert_array_equal(marks.pixels_YX, EXPECTED)
    assert marks.level == level


def test_in_black_and_white_dark_grey_is_no_defect() -> None:
    pixels = np.where(EXPECTED, 255, 90).astype(np.uint8)
    np.testing.assert_array_equal(read_marks(encoded(Image.fromarray(pixels)), LIMITS).pixels_YX, EXPECTED)


def test_in_a_palette_every_colour_but_black_marks() -> None:
    numbers = Image.fromarray(EXPECTED.astype(np.uint8) * 8)
    numbers.putpixel((0, 0), 1)
    numbers.putpalette([0, 0, 0, 200, 0, 0, *[0] * 18, 64, 0, 0])
    found = read_marks(encoded(numbers), LIMITS).pixels_YX
    assert found[0, 0]
    np.testing.assert_array_equal(found[1:], EXPECTED[1:])


def few_bits(numbers_YX: NDArray[np.uint8], bits: int) -> bytes:
    """A PNG of so many bits of grey, which Pillow reads and does not write."""
    height, width = numbers_YX.shape
    single_YXB = np.unpackbits(numbers_YX[..., None], axis=2)[..., -bits:]
    rows = np.packbits(single_YXB.reshape(height, -1), axis=1)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize(("bits", "numbers"), [(1, (0, 1)), (2, (0, 1, 3)), (4, (0, 1, 7, 8, 15))])
def test_every_number_of_few_bits_marks(bits: int, numbers: tuple[int, ...]) -> None:
    numbers_YX = np.resize(np.array(numbers, dtype=np.uint8), (16, 32))
    found = read_marks(few_bits(numbers_YX, bits), LIMITS).pixels_YX
    np.testing.assert_array_equal(found, numbers_YX > 0)


def test_an_empty_mask_marks_nothing() -> None:
    assert not read_marks(bar_mask(0), LIMITS).pixels_YX.any()


@pytest.mark.parametrize(
    ("levels", "marked"), [((0, 1, 2), 2), ((0, 255, 0), 1), ((0, 1, 65535), 1), ((0, 20000, 0), 1)]
)
def test_masks_of_16_bits_hold_numbers_or_black_and_white(levels: tuple[int, ...], marked: int) -> None:
    rows = np.repeat(np.array([levels], dtype=np.uint16), 16, axis=0).repeat(16, axis=1)
    assert read_marks(encoded(Image.fromarray(rows)), LIMITS).pixels_YX.sum() == marked * 256


def test_low_and_high_numbers_of_16_bits_mark_upright() -> None:
    rows = np.zeros((16, 20), dtype=np.uint16)
    rows[0, 0], rows[0, 1] = 2, 300
    exif = Image.Exif()
    exif[0x0112] = 6
    marks = read_marks(encoded(Image.fromarray(rows), exif=exif), LIMITS)
    assert marks.level == 300
    assert marks.pixels_YX.shape == (20, 16)
    assert np.argwhere(marks.pixels_YX).tolist() == [[0, 15], [1, 15]]


def test_a_folder_elsewhere_is_not_looked_into(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", ["000.png"])
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/link").symlink_to(tmp_path / "elsewhere")
    for place in ("../elsewhere", str(tmp_path / "elsewhere"), "link"):
        assert mask_files(tmp_path / "raw", place) == [place]


def test_a_folder_stands_for_the_images_in_it(tmp_path: Path) -> None:
    fill(tmp_path, ["m/001.png", "m/000.png", "m/.hidden.png", "single.png"])
    write(tmp_path / "m/Thumbs.db", b"")
    assert mask_files(tmp_path, "m") == ["m/000.png", "m/001.png"]
    assert mask_files(tmp_path, "single.png") == ["single.png"]
    assert mask_files(tmp_path, "nowhere.png") == ["nowhere.png"]


def test_saturations_are_found_by_grey_level(tmp_path: Path) -> None:
    kinds = [
        {"defect_name": "a", "pixel_value": 255, "saturation_threshold": 2000, "relative_saturation": False},
        {"defect_name": "b", "pixel_value": 254, "saturation_threshold": 1.0, "relative_saturation": True},
    ]
    write(tmp_path / "defects_config.json", json.dumps(kinds).encode())
    assert read_saturations(tmp_path) == {255: Saturation(2000.0, False), 254: Saturation(1.0, True)}
