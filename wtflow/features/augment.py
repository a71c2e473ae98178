"""Copies of the training photographs of a small line, each moved, turned and enlarged a little, as another part would
lie before the camera.

A copy is a row beside its photograph's: its image_id is the photograph's, "~", and a digest of what was done to it. So
the feature cache keeps it like any other image, and what is done to it follows from its name alone. Its split is
`copy`: it trains, and is neither held out nor calibrated with nor counted as an image.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field

from wtflow.artefact import digest_of, sha256_bytes
from wtflow.data.shards import COPY
from wtflow.params import Section

MARK = "~"


class AugmentParams(Section):
    """Which lines get copies, and how far these depart from their photographs, evenly to both sides."""

    below: Annotated[int, Field(ge=0)] = 0
    """Lines with fewer training images get copies. 0: none does."""
    copies: Annotated[int, Field(gt=0)] = 3
    """Of each training image."""
    shift: Annotated[float, Field(ge=0, le=0.1)] = 0.025
    """Share of the picture's sides that it moves by, at most."""
    turn: Annotated[float, Field(ge=0, le=45)] = 1.0
    """Degrees about the middle, at most."""
    scale: Annotated[float, Field(ge=0, le=0.1)] = 0.03
    """Share that it grows or shrinks by, at most."""


def with_copies(rows: Sequence[dict[str, Any]], params: AugmentParams) -> list[dict[str, Any]]:
    """Manifest rows, and beside each of `train` its copies, if the line is small; sorted by image_id as before."""
    trained = [row for row in rows if row["split"] == "train"]
    if len(trained) >= params.below:
        return list(rows)
    departs = params.model_dump(mode="json", include={"shift", "turn", "scale"})
    made = [
        {**row, "split": COPY, "image_id": f"{row['image_id']}{MARK}{digest_of([departs, number])[:16]}"}
        for row in trained
        for number in range(params.copies)
    ]
    return sorted([*rows, *made], key=lambda row: str(row["image_id"]))


def source_of(image_id: str) -> str:
    """The image_id of the photograph: of a copy, that of the one it was made from."""
    return image_id.partition(MARK)[0]


def varied(picture: Image.Image, row: Mapping[str, Any], params: AugmentParams) -> Image.Image:
    """The picture as its row wants it: moved, turned and scaled if the row is a copy's; borders that come in are
    mirrored."""
    if row["image_id"] == source_of(row["image_id"]):
        return picture
    draw = np.random.default_rng(int(sha256_bytes(row["image_id"].encode()), 16))
    across, down, turn, scale = draw.uniform(-1, 1, 4) * (params.shift, params.shift, params.turn, params.scale)
    angle, zoom = math.radians(turn), 1 + scale
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    width, height = picture.size
    middle_x, middle_y = width / 2, height / 2
    lean = math.sin(math.radians(params.turn))  # how far a long side reaches beyond a short one
    left, above = math.ceil(middle_x + lean * height), math.ceil(middle_y + lean * width)
    edges = [(above, above), (left, left), (0, 0)][: np.asarray(picture).ndim]
    mirrored = Image.fromarray(np.pad(np.asarray(picture), edges, mode="symmetric"))
    # output (x, y) -> where it is taken from: turned and scaled about the middle, then moved
    matrix = (
        *(cosine, sine, left + middle_x * (1 + across * 2) - cosine * middle_x - sine * middle_y),
        *(-sine, cosine, above + middle_y * (1 + down * 2) + sine * middle_x - cosine * middle_y),
    )
    return mirrored.transform(picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC)
