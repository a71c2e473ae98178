"""The layout of MPDD: that of MVTec AD, where a mask may also bear the name of its image: <stem>.png."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from wtflow.data.manifest import PrepareParams
from wtflow.data.sources import mvtec_ad
from wtflow.data.sources.source_image import SourceImage, is_there


def images(raw: Path, params: PrepareParams) -> Iterator[SourceImage]:
    """As `mvtec_ad.images`; <stem>_mask.png comes before <stem>.png."""
    for image in mvtec_ad.images(raw, params):
        yield replace(image, mask_path=_there(raw, image.mask_path))


def _there(raw: Path, mask: str | None) -> str | None:
    if mask is None or is_there(raw, mask):
        return mask
    plain = mask.removesuffix("_mask.png") + ".png"
    return plain if is_there(raw, plain) else mask
