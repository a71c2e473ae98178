"""Small raw folders of real image files, for the tests of everything that reads them."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wtflow.data.manifest import PrepareParams

SETTINGS: dict[str, Any] = {
    "layout": "folder",
    "test_fraction": 0.3,
    "calibrate_fraction": 0.3,
    "salt": "tests",
    "group_block": 2,
    "max_rejected_fraction": 1.0,
}


def params(**changes: Any) -> PrepareParams:
    """Settings that reject nothing wholesale, with some of them changed."""
    return PrepareParams.parse(SETTINGS | changes, where="tests")


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """An RGB picture that no other seed gives."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(path: Path, data: bytes) -> Path:
    """Write a file, and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def fill(folder: Path, names: list[str], first_seed: int = 0) -> None:
    """PNG files of distinct content under the given names."""
    for seed, name in enumerate(names, start=first_seed):
        write(folder / name, encoded(noise(seed)))


def plain_folder(raw: Path, good: int = 30, bad: int = 3) -> Path:
    """Layout `folder`: good/000.png ..., bad/scratch/000.png ...; enough for all splits."""
    fill(raw, [f"good/{number:03d}.png" for number in range(good)])
    fill(raw, [f"bad/scratch/{number:03d}.png" for number in range(bad)], first_seed=10_000)
    return raw
