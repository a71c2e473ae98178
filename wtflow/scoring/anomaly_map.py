"""Heat maps a person can trust: one colour scale a line, never stretched to the image at hand."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from PIL import Image

from wtflow.shapes import AnomalyMap

# Anchors of the colour scale, from no energy over the pixel threshold (the middle) to twice the threshold and beyond.
SCALE = np.array([[29, 53, 87], [69, 123, 157], [241, 196, 83], [230, 111, 40], [170, 20, 30]], dtype=np.float32)
COLOURS = np.rint(
    np.stack([np.interp(np.linspace(0, 4, 255), range(5), channel) for channel in SCALE.T], axis=-1)
).astype(np.uint8)
"""uint8 [255, 3], from 0 over the pixel threshold (127) to twice that."""


def enlarge(map_BHW: AnomalyMap, size: tuple[int, int]) -> AnomalyMap:
    """Bilinear to (height, width). Corner places sit on the corner pixels, as in the paper (align_corners)."""
    return F.interpolate(map_BHW[:, None], size, mode="bilinear", align_corners=True)[:, 0]


def heatmap(map_HW: NDArray[np.float32], size: tuple[int, int], pixel_threshold: float) -> NDArray[np.uint8]:
    """Colours of an anomaly map at `size` = (height, width): uint8 [height, width, 3].

    The scale belongs to the line: blue at 0, yellow at `pixel_threshold`, red at twice that and above.
    """
    colours_YX3: NDArray[np.uint8] = COLOURS[_steps(map_HW, size, pixel_threshold)]
    return colours_YX3


def overlay(picture: Image.Image, map_HW: NDArray[np.float32], pixel_threshold: float) -> Image.Image:
    """The photograph in grey under its heat map; the map covers more where the energy is higher."""
    step_YX = _steps(map_HW, (picture.height, picture.width), pixel_threshold)
    # a tenth to three fifths
    cover = Image.fromarray(step_YX.clip(26, 153))
    return Image.composite(Image.fromarray(COLOURS[step_YX]), picture.convert("L").convert("RGB"), cover)


def _steps(map_HW: NDArray[np.float32], size: tuple[int, int], pixel_threshold: float) -> NDArray[np.uint8]:
    """Where on the scale each pixel is, 0 to 254 for 0 to twice the threshold. A picture of 50 million pixels comes by
    here: in place, and in bytes."""
    share_HW = torch.from_numpy(np.asarray(map_HW, dtype=np.float32)) * (127 / pixel_threshold)
    steps: NDArray[np.uint8] = enlarge(share_HW[None], size)[0].round_().clamp_(0, 254).byte().numpy()
    return steps
