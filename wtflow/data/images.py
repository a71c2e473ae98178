"""From the bytes of a photograph to what the backbone sees. Training and service both come through here.

    bytes --decode--> picture, RGB or grey, upright --preprocess--> uint8 [height, width, 3]

`decode` trusts nothing: size in bytes first, then width and height as the header states them, and only then
the pixels. It works on its own buffer and leaves Pillow's module-wide settings alone: threads may share it.
"""

import re
import struct
from io import BytesIO
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from pydantic import Field

from wtflow.errors import ImageError, WTFlowError
from wtflow.params import Section

PLUGINS = (PngImagePlugin, JpegImagePlugin, BmpImagePlugin, TiffImagePlugin, WebPImagePlugin)
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
PILLOW_MAX_PIXELS = 178_956_970  # twice Pillow's own limit: from there on it refuses by itself
MAGIC = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|II\*\x00|MM\x00\*|RIFF....WEBP", re.DOTALL)
ORIENTATION_TAG = 0x0112
BITS_TAG = 258  # TIFF BitsPerSample
PHOTOMETRIC_TAG = 262  # TIFF PhotometricInterpretation; 0: white is zero
MAX_SCANS = 500
"""Start-of-scan markers in a JPEG: usual ones have up to some 10 a frame. Each costs a pass over all pixels."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageLimits(Section):
    """What is accepted as a photograph."""

    max_bytes: Annotated[int, Field(gt=0)] = 32 * 1024 * 1024
    """Bytes of the file."""
    max_pixels: Annotated[int, Field(gt=0, le=PILLOW_MAX_PIXELS)] = 50_000_000
    """Width times height, as the header states them."""
    min_side: Annotated[int, Field(gt=0)] = 16
    """Pixels of the shorter side."""


def decode(data: bytes, limits: ImageLimits, wide: bool = False) -> Image.Image:
    """The whole photograph with 8 bits a channel, turned upright by its EXIF orientation: mode L if the file has grey
    levels and nothing else, which saves two thirds of the resizing, mode RGB otherwise.

    Formats: PNG, JPEG, BMP, TIFF, WebP; of several frames the first. Transparency is dropped, not blended.
    Grey levels of 16 bits are divided by 257; if `wide` they stay, in mode I;16. Raises `ImageError`, whatever the
    bytes are.
    """
    if not data:
        raise ImageError("empty", "the image has no bytes: was the upload or the copy cut off at once?")
    if len(data) > limits.max_bytes:
        raise ImageError("too_many_bytes", f"{len(data)} bytes, limits.max_bytes is {limits.max_bytes}")
    image = _opened(data, limits)
    _check_size(image, limits)
    scans = data.count(b"\xff\xda") if isinstance(image, JpegImagePlugin.JpegImageFile) else 0  # no pixel data holds it
    if scans > MAX_SCANS:
        raise ImageError("too_many_pixels", f"a JPEG that draws its pixels {scans} times: save it anew")
    try:
        image.load()
        return _upright(image, wide)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise what they like on broken data: OSError, SyntaxError, ...
        raise ImageError("truncated", f"the {image.format} is cut off or damaged: {error}") from error


def preprocess(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize RGB or L to `size` = (height, width), bilinear with antialiasing -> uint8 [height, width, 3]. Grey gives
    the same bits as the RGB picture of it.

    The one preprocessing there is: the feature cache and the service must see the same numbers.
    """
    if image.mode not in ("RGB", "L"):
        raise WTFlowError(f"preprocess needs mode RGB or L, not {image.mode}: use decode(), or convert('RGB').")
    height, width = size
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR).convert("RGB"), dtype=np.uint8)


def _opened(data: bytes, limits: ImageLimits) -> Image.Image:
    """Read the header only."""
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels("far too many", limits) from error
    except MemoryError:
        raise
    except Exception as error:
        if MAGIC.match(data):
            message = "it begins like an image, but the header is cut off, damaged or of an unknown kind"
            raise ImageError("truncated", f"{message}: {error}") from error
        raise ImageError("not_an_image", f"the bytes are none of {', '.join(FORMATS)}") from error


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise _too_many_pixels(f"{width} x {height}", limits)
    if min(width, height) < limits.min_side:
        raise ImageError("too_small", f"{width} x {height} pixels, limits.min_side is {limits.min_side}")


def _too_many_pixels(size: str, limits: ImageLimits) -> ImageError:
    return ImageError("too_many_pixels", f"{size} pixels, limits.max_pixels is {limits.max_pixels} in all")


def _upright(image: Image.Image, wide: bool) -> Image.Image:
    turn = UPRIGHT.get(_orientation(image))
    image.info.pop("transparency", None)  # not wanted, and convert() warns of it
    picture = _grey(image, wide) if image.mode[0] in "IF" else image
    if picture.mode not in ("L", "I;16"):
        picture = picture.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) if there is none or the EXIF block is garbage."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except (struct.error, KeyError, SyntaxError, TypeError, ValueError, ZeroDivisionError, OSError):
        return 1


def _grey(image: Image.Image, wide: bool) -> Image.Image:
    """Grey of 12 or 16 bits to 8, or to 16 if `wide`. What has no fixed white is refused."""
    if image.mode == "F":
        raise ImageError("not_an_image", "floating-point pixels have no fixed white: save 8 or 16 bits")
    levels = np.asarray(image)
    if image.mode == "I" and (levels.min() < 0 or levels.max() > 65535):
        raise ImageError("not_an_image", "pixels of 32 bits, or below 0: save it with 8 or 16 bits")
    levels = levels.astype(np.uint16)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.tag_v2.get(BITS_TAG) == (12,):
            levels = (levels << 4) | (levels >> 8)
        if image.tag_v2.get(PHOTOMETRIC_TAG) == 0:
            levels = 65535 - levels  # Pillow does so for 8 bits only
    return Image.fromarray(levels if wide else (levels // 257 + (levels % 257 > 128)).astype(np.uint8))
