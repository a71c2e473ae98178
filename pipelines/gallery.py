"""The report's pictures of single images: photograph beside heat map, chosen by score."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from pipelines.evaluation import Evaluation, ScoredImage, read_mask, read_raw
from wtflow.artefact import sha256_bytes
from wtflow.data.images import decode
from wtflow.errors import DigestError
from wtflow.scoring.anomaly_map import heatmap, overlay

LONGEST_SIDE = 320
FLAT = 1.75
"""Width over height from which photograph and heat map stand one above the other: side by side they would be tiny."""
OUTLINE = (60, 255, 120)  # a hue that the heat map does not use


@dataclass(frozen=True)
class Card:
    """A photograph, its heat map, and what the bundle says of it. Pictures are data URIs."""

    photograph: str
    heat: str
    image: ScoredImage
    outlined: bool
    """The heat map bears the outline of the marked defect."""
    flat: bool
    """Far wider than high."""


@dataclass(frozen=True)
class Gallery:
    """Cards under a title, with a sentence that says how to read them."""

    title: str
    guide: str
    cards: Sequence[Card]


def galleries(evaluation: Evaluation, raw: Path, size: int) -> list[Gallery]:
    """The hardest `size` normal and anomalous images, then half as many from among the other anomalous ones."""
    normal = sorted(evaluation.labelled("normal"), key=lambda image: (-image.verdict.score, image.image_id))
    anomalous = sorted(evaluation.labelled("anomalous"), key=lambda image: (image.verdict.score, image.image_id))
    others, shown = anomalous[size:], min(size // 2, len(anomalous[size:]))
    chosen = [
        (
            "Normal images with the highest scores",
            "Those marked “flagged” are false alarms. Look at what lights up: dirt, a reflection or a "
            "shifted part calls for a steadier picture, a true defect for a corrected label.",
            normal[:size],
        ),
        (
            "Anomalous images with the lowest scores",
            "Those marked “passed” were missed. If the defect shows in the photograph and the heat map stays "
            "blue there, the model does not see this kind of defect.",
            anomalous[:size],
        ),
        (
            "Other anomalous images",
            "At even steps through the scores above those: neither the hardest nor the plainest. "
            "The heat should lie on the defect and not beside it.",
            [others[(2 * number + 1) * len(others) // (2 * shown)] for number in range(shown)],
        ),
    ]
    return [
        Gallery(title, guide, [card(evaluation, image, raw) for image in images])
        for title, guide, images in chosen
        if images
    ]


def card(evaluation: Evaluation, image: ScoredImage, raw: Path) -> Card:
    """Lay the heat map over the photograph. `DigestError` if it is not the one that was scored."""
    path, limits = raw / image.path, evaluation.bundle.config.limits
    data = read_raw(path)
    if sha256_bytes(data) != image.image_id:
        raise DigestError(f"{path}: not the image that was scored. Type: dvc checkout, or prepare the line again.")
    photograph = decode(data, limits)
    photograph.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    heat = overlay(photograph, image.verdict.anomaly_map, evaluation.bundle.calibration.pixel_threshold)
    if image.mask_path:
        heat = outlined(heat, read_mask(raw / image.mask_path, (heat.height, heat.width), limits))
    flat = photograph.width >= FLAT * photograph.height
    return Card(jpeg_uri(photograph), jpeg_uri(heat), image, image.mask_path is not None, flat)


def outlined(picture: Image.Image, mask_YX: np.ndarray) -> Image.Image:
    """`picture` with a line of one pixel around the mask: what the mask covers, however thin, stays to be seen."""
    border_YX = ndimage.binary_dilation(mask_YX) & ~mask_YX
    pixels_YX3 = np.array(picture)
    pixels_YX3[border_YX] = OUTLINE
    return Image.fromarray(pixels_YX3)


def colour_scale(pixel_threshold: float) -> str:
    """The heat map's colours from 0 to twice the pixel threshold, left to right, as a data URI."""
    ramp = np.linspace(0.0, 2 * pixel_threshold, 256, dtype=np.float32)
    strip = Image.fromarray(heatmap(np.stack([ramp, ramp]), (12, 256), pixel_threshold))
    return jpeg_uri(strip)


def jpeg_uri(picture: Image.Image) -> str:
    """A picture as it can stand in an `img` tag."""
    buffer = BytesIO()
    picture.save(buffer, format="JPEG", quality=90, subsampling=0)  # of a thin line the colour stays
    return data_uri("image/jpeg", buffer.getvalue())


def data_uri(media_type: str, data: bytes) -> str:
    """Bytes as the source of an `img` tag."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
