"""3,000 damaged files of 30 kinds among good photographs: each is rejected for a reason, and no good one is lost."""

import gzip
import random
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.data_sets import photographs
from tests.data.raw_folders import encoded, params, write
from wtflow.data.prepare import prepare

EACH = 100
LIMITS = {"max_bytes": 60_000, "max_pixels": 1_000_000, "min_side": 16}
Damage = Callable[[Image.Image, random.Random], bytes]


def cut(file_format: str, low: float, high: float) -> Damage:
    """The first part of a file of this format."""

    def damage(picture: Image.Image, dice: random.Random) -> bytes:
        data = encoded(picture, file_format)
        return data[: max(16, int(len(data) * dice.uniform(low, high)))]

    return damage


def fuzzed(change: Callable[[bytearray, random.Random], None]) -> Damage:
    """A PNG after random changes, as many as it takes until nobody can read it."""

    def damage(picture: Image.Image, dice: random.Random) -> bytes:
        data = bytearray(encoded(picture))
        while True:
            change(data, dice)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    Image.open(BytesIO(data)).load()
            except (OSError, SyntaxError, ValueError):  # what Pillow says of broken files
                return bytes(data)

    return damage


def overwrite(data: bytearray, dice: random.Random) -> None:
    data[dice.randrange(len(data))] = dice.randrange(256)


def insert(data: bytearray, dice: random.Random) -> None:
    data.insert(dice.randrange(len(data)), dice.randrange(256))


def remove(data: bytearray, dice: random.Random) -> None:
    del data[dice.randrange(len(data))]


def swap_blocks(data: bytearray, dice: random.Random) -> None:
    first, second = (dice.randrange(0, len(data) - 512) for _ in range(2))
    data[first : first + 256], data[second : second + 256] = data[second : second + 256], data[first : first + 256]


def fill_a_sector(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(0, len(data) - 512)
    data[start : start + 512] = bytes(512)


def claims(width: int, height: int) -> Damage:
    """A PNG whose header states another size, with the right checksum."""

    def damage(picture: Image.Image, dice: random.Random) -> bytes:
        data = bytearray(encoded(picture))
        data[16:24] = struct.pack(">II", width + dice.randrange(50), height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)

    return damage


def constant(make: Callable[[random.Random], bytes]) -> Damage:
    """No image at all."""
    return lambda picture, dice: make(dice)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"))


KINDS: dict[str, tuple[str, Damage]] = {
    "no bytes": ("empty", constant(lambda dice: b"")),
    "one byte": ("not_an_image", constant(lambda dice: bytes([dice.randrange(256)]))),
    "zeros": ("not_an_image", constant(lambda dice: bytes(dice.randrange(1, 9000)))),
    "noise": ("not_an_image", constant(lambda dice: b"\x01" + dice.randbytes(5000))),
    "text": ("not_an_image", constant(lambda dice: f"part {dice.random()} is missing\n".encode() * 9)),
    "an error page": ("not_an_image", constant(lambda dice: b"<!doctype html><title>502 Bad Gateway</title>" * 20)),
    "a drawing": ("not_an_image", constant(lambda dice: b"<svg xmlns='http://www.w3.org/2000/svg'><path/></svg>")),
    "an archive": ("not_an_image", lambda picture, dice: gzip.compress(encoded(picture))),
    "a document": ("not_an_image", constant(lambda dice: b"%PDF-1.7\n" + dice.randbytes(900))),
    "a GIF": ("not_an_image", lambda picture, dice: encoded(picture, "GIF")),
    "a PNG without its first bytes": ("not_an_image", lambda picture, dice: encoded(picture)[dice.randrange(1, 9) :]),
    "a JPEG with an overwritten head": (
        "not_an_image",
        lambda picture, dice: bytes(dice.randrange(4, 200)) + encoded(picture, "JPEG")[200:],
    ),
    "line ends translated": ("not_an_image", lambda picture, dice: encoded(picture).replace(b"\r\n", b"\n")),
    "floating-point levels": (
        "not_an_image",
        lambda picture, dice: encoded(Image.fromarray(pixels(picture).astype(np.float32)), "TIFF"),
    ),
    "32-bit levels": (
        "not_an_image",
        lambda picture, dice: encoded(Image.fromarray(pixels(picture).astype(np.int32) * 1000), "TIFF"),
    ),
    "a PNG's signature alone": ("truncated", lambda picture, dice: encoded(picture)[: dice.randrange(8, 16)]),
    "a PNG cut in the header": ("truncated", lambda picture, dice: encoded(picture)[: dice.randrange(16, 33)]),
    "a PNG cut": ("truncated", cut("PNG", 0.1, 0.95)),
    "a JPEG cut": ("truncated", cut("JPEG", 0.3, 0.9)),
    "a JPEG cut in the header": ("truncated", cut("JPEG", 0.01, 0.05)),
    "a TIFF cut": ("truncated", cut("TIFF", 0.1, 0.9)),
    "a BMP cut": ("truncated", cut("BMP", 0.1, 0.9)),
    "a WebP cut": ("truncated", cut("WEBP", 0.1, 0.9)),
    "a PNG that claims another size": ("truncated", claims(97, 500)),
    "a PNG with bytes overwritten": ("truncated", fuzzed(overwrite)),
    "a PNG with a sector of zeros": ("truncated", fuzzed(fill_a_sector)),
    "a PNG with blocks swapped": ("truncated", fuzzed(swap_blocks)),
    "a decompression bomb": ("too_many_pixels", claims(60_000, 60_000)),
    "a thumbnail": ("too_small", lambda picture, dice: encoded(picture.resize((dice.randrange(1, 16), 40)))),
    "a file with a tail": ("too_many_bytes", lambda picture, dice: encoded(picture) + dice.randbytes(60_000)),
}
FUZZED = {"a PNG with bytes overwritten", "a PNG with a sector of zeros", "a PNG with blocks swapped"}
"""Where the damage may also hit the first bytes, by which a PNG is known, or the size that it states."""


def good_ones(pictures: Iterator[Image.Image]) -> Iterator[tuple[str, bytes]]:
    """Whole photographs in unusual forms, under unusual names."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for number in range(10):
        one = next(pictures)
        yield f"plain {number}.png", encoded(one)
        yield f"größe/ŧeil {number} – 部品.PNG", encoded(one.rotate(1))
        yield f"16 bit {number}.png", encoded(Image.fromarray(pixels(one).astype(np.uint16) * 257))
        yield f"palette {number}.png", encoded(one.convert("P"))
        yield f"alpha {number}.png", encoded(one.convert("RGBA").rotate(2))
        yield f"cmyk {number}.jpeg", encoded(one.convert("CMYK"), "JPEG")
        yield f"turned {number}.jpg", encoded(one, "JPEG", exif=turned)
        yield f"lossless {number}.webp", encoded(one.rotate(3), "WEBP", lossless=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning:PIL")
def test_each_damaged_file_is_rejected_for_its_reason_and_every_good_one_is_kept(tmp_path: Path) -> None:
    assert len(KINDS) == 30
    raw, dice, pictures = tmp_path / "raw", random.Random(0), photographs(side=96)
    good = dict(good_ones(pictures))
    for name, data in good.items():
        write(raw / "good" / name, data)
    damaged, real = {}, [next(pictures) for _ in range(EACH)]
    for kind, (reason, damage) in KINDS.items():
        for number, picture in enumerate(real):
            path = f"good/{kind}/{number}.png"
            damaged[path] = (kind, reason)
            write(raw / path, damage(picture, dice))
    assert len(damaged) == 3000
    prepared = prepare(raw, "line", params(limits=LIMITS))
    assert {row["path"] for row in prepared.manifest.rows()} == {f"good/{name}" for name in good}
    rejected = {row["path"]: row for row in prepared.rejected.to_pylist()}
    assert rejected.keys() == damaged.keys()
    wrong = Counter(
        (kind, rejected[path]["reason"])
        for path, (kind, reason) in damaged.items()
        if rejected[path]["reason"] != reason and kind not in FUZZED
    )
    assert not wrong
    known = {"truncated", "not_an_image", "too_many_pixels", "too_small"}
    assert {rejected[path]["reason"] for path, (kind, _) in damaged.items() if kind in FUZZED} <= known
    assert all(len(row["detail"].split()) >= 4 for row in rejected.values())
