"""Which images of one split are nearly those of another: the same photograph, saved again or resized. It is found
where the scene has structure; of uniform surfaces, whose thumbnails hold little but noise, a JPEG copy is not.

An image's fingerprint is the slopes of its grey thumbnail of 13 x 13 pixels, less the median of the line: photographs
of one part under one camera are all alike, and only what sets an image apart can tell. Likeness is the cosine of two
fingerprints. The search looks at every pair of images in different splits, so it grows with the square of the line. At
most pairs it looks in few numbers: for unit vectors x, y and a projection P on the main directions of all of them

    x . y <= Px . Py + |x - Px| |y - Py|

and where that is below what counts as near, the pair is done with.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 13
NEAR = 0.99
BLOCK = 4096
MAIN = 32
"""Directions that the first look is at, of 288."""
ROUNDING = 1e-4
"""What the first look may be off."""
SPLITS = ("train", "calibrate", "test")


class Pair(NamedTuple):
    """An image and the one of an earlier split that it is most like; places in the sequence given."""

    image: int
    other: int
    likeness: float


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """Grey, 13 x 13 pixels, whatever the shape was."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def near_duplicates(thumbnails: Sequence[NDArray[np.uint8]], splits: Sequence[str]) -> list[Pair]:
    """For each image of calibrate or test the one of an earlier split that it is most like, if by 0.99 or more."""
    if not thumbnails:
        return []
    prints_ND = _fingerprints(np.stack(thumbnails))
    bounds_NK = _bounds(prints_ND)
    place_N = np.array([SPLITS.index(split) for split in splits])
    pairs = []
    for place in (1, 2):
        earlier, later = np.flatnonzero(place_N < place), np.flatnonzero(place_N == place)
        for start in range(0, len(later) if len(earlier) else 0, BLOCK):
            pairs += _nearest(prints_ND, bounds_NK, later[start : start + BLOCK], earlier)
    return pairs


def _fingerprints(thumbnails_NYX: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unit length, or all 0 where nothing sets the image apart."""
    grey_NYX = thumbnails_NYX.astype(np.float32)
    across_NYX, down_NYX = np.diff(grey_NYX, axis=2)[:, 1:], np.diff(grey_NYX, axis=1)[:, :, 1:]
    slopes_ND = np.concatenate([across_NYX, down_NYX], axis=1).reshape(len(grey_NYX), -1)
    slopes_ND -= np.median(slopes_ND, axis=0)
    slopes_ND -= slopes_ND.mean(axis=1, keepdims=True)
    slopes_ND /= np.maximum(np.linalg.norm(slopes_ND, axis=1, keepdims=True), 1e-6)
    prints_ND: NDArray[np.float32] = slopes_ND
    return prints_ND


def _bounds(prints_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors whose product is no less than that of the fingerprints: (Px, |x - Px|)."""
    _, directions_DD = np.linalg.eigh(prints_ND.T @ prints_ND)
    main_NK = prints_ND @ directions_DD[:, -MAIN:]
    rest_N = np.sqrt(np.maximum(np.square(prints_ND).sum(axis=1) - np.square(main_NK).sum(axis=1), 0))
    return np.concatenate([main_NK, rest_N[:, None]], axis=1)


def _nearest(
    prints_ND: NDArray[np.float32],
    bounds_NK: NDArray[np.float32],
    images: NDArray[np.intp],
    others: NDArray[np.intp],
) -> list[Pair]:
    best, nearest = np.full(len(images), -1.0, dtype=np.float32), np.zeros(len(images), dtype=np.intp)
    for start in range(0, len(others), BLOCK):
        block = others[start : start + BLOCK]
        at_most_IO = bounds_NK[images] @ bounds_NK[block].T
        rows = np.flatnonzero(at_most_IO.max(axis=1) >= NEAR - ROUNDING)
        cosine_RO = prints_ND[images[rows]] @ prints_ND[block].T
        place = cosine_RO.argmax(axis=1)
        value = cosine_RO[np.arange(len(rows)), place]
        better = value > best[rows]
        nearest[rows[better]], best[rows[better]] = block[place[better]], value[better]
    found = zip(images.tolist(), nearest.tolist(), best.tolist(), strict=True)
    return [Pair(image, other, likeness) for image, other, likeness in found if likeness >= NEAR]
