"""Where an image is defective: a mask file, or a folder with a file for each region.

A mask marks a pixel where a channel is above 127, of 16 bits above 32767. Where none is, and in files with a palette or
with 2 or 4 bits of grey, every pixel that is not black is marked: such masks hold numbers of defects rather than black
and white.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wtflow.artefact import read_json
from wtflow.data.images import FORMATS, ImageLimits, decode
from wtflow.data.tree import files, is_image
from wtflow.errors import WTFlowError

FEW_BITS = (b"\2\0", b"\4\0")
"""Bits and kind of colour of a PNG of 2 or 4 bits of grey, which Pillow spreads over 0 to 255."""
SATURATIONS = "defects_config.json"


@dataclass(frozen=True)
class Marks:
    """A mask as it was drawn."""

    pixels_YX: NDArray[np.bool_]
    """True where the image is defective."""
    level: int
    """The highest grey level: in a mask of one region the number of its kind of defect."""


@dataclass(frozen=True)
class Saturation:
    """How much of a region has to be found."""

    threshold: float
    """Pixels of the mask as it was drawn, or a share of the region."""
    relative: bool
    """Whether `threshold` is a share."""


def mask_files(root: Path, mask_path: str) -> list[str]:
    """The files behind a `mask_path`, relative to `root`, sorted: itself, or the images of the folder that it names in
    `root`."""
    place = root / mask_path
    if not place.is_dir() or not place.resolve().is_relative_to(root.resolve()):
        return [mask_path]
    below = (path for path in files(root / mask_path) if is_image(path))
    return [(PurePosixPath(mask_path) / path).as_posix() for path in below]


def read_marks(data: bytes, limits: ImageLimits) -> Marks:
    """What the bytes of a mask file mark. Raises `ImageError` as `decode` does."""
    picture = decode(data, limits, wide=True)
    is_wide = picture.mode == "I;16"
    levels_YX = np.asarray(picture) if is_wide else np.asarray(picture.convert("RGB")).max(axis=2)
    level, half = int(levels_YX.max()), 32767 if is_wide else 127
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        few_bits = image.format == "PNG" and data[24:26] in FEW_BITS
        numbers = image.mode == "P" or few_bits or level <= half
    return Marks(levels_YX > (0 if numbers else half), level // 257 if is_wide and not numbers else level)


def read_saturations(root: Path) -> Mapping[int, Saturation]:
    """For each grey level of a region's mask, how much of the region has to be found: defects_config.json of MVTec LOCO
    AD, a list of kinds of defects with `pixel_value`, `saturation_threshold` and `relative_saturation`."""
    path = root / SATURATIONS
    kinds = read_json(path)
    try:
        found = {
            int(kind["pixel_value"]): Saturation(float(kind["saturation_threshold"]), bool(kind["relative_saturation"]))
            for kind in kinds
        }
    except (KeyError, TypeError, ValueError) as error:
        raise WTFlowError(
            f"{path}: not a list of defects with pixel_value, saturation_threshold and relative_saturation "
            f"({type(error).__name__}: {error}). Copy it from the data set anew."
        ) from None
    wrong = [level for level, one in found.items() if not 0 < one.threshold <= (1 if one.relative else float("inf"))]
    if wrong:
        raise WTFlowError(
            f"{path}: saturation_threshold of pixel_value {wrong[0]} has to be above 0, and at most 1 where "
            "relative_saturation is true. Copy it from the data set anew."
        )
    return found
