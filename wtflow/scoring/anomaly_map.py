"""Heat maps a person can trust: one colour scale a line, never stretched to the image at hand."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from PIL import Image

from wtflow.shapes import AnomalyMap

# Anchors of the colour scale, from no energy over the pixel threshold (the middle) to twice the threshold and beyond.
SCALE = np.array([[29, 53, 87], [69, 123, 157], [241, 196, 83], [230, 111, 40], [170, 20, 30]], dtype=np.float32)
POSITIONS = np.linspace(0.0, 1.0, len(SCALE))


def enlarge(map_BHW: AnomalyMap, size: tuple[int, int]) -> AnomalyMap:
    """Bilinear to (height, width). Corner places sit on the corner pixels, as in the paper (align_corners)."""
    return F.interpolate(map_BHW[:, None], size, mode="bilinear", align_corners=True)[:, 0]


def heatmap(map_HW: NDArray[np.float32], size: tuple[int, int], pixel_threshold: float) -> NDArray[np.uint8]:
    """Colours of an anomaly map at `size` = (height, width): uint8 [height, width, 3].

    The scale belongs to the line: blue at 0, yellow at `pixel_threshold`, red at twice that and above.
    """
    map_YX = enlarge(torch.from_numpy(np.asarray(map_HW, dtype=np.float32))[None], size)[0].numpy()
    position_YX = np.clip(map_YX / (2 * pixel_threshold), 0.0, 1.0)
    channels = [np.interp(position_YX, POSITIONS, SCALE[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def overlay(picture: Image.Image, map_HW: NDArray[np.float32], pixel_threshold: float) -> Image.Image:
    """The photograph in grey under its heat map; the map covers more where the energy is higher."""
    size = (picture.height, picture.width)
    colour = heatmap(map_HW, size, pixel_threshold).astype(np.float32)
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    map_YX = enlarge(torch.from_numpy(np.asarray(map_HW, dtype=np.float32))[None], size)[0].numpy()
    cover = np.clip(map_YX / (2 * pixel_threshold), 0.1, 0.6)[:, :, None]
    return Image.fromarray(np.rint(grey * (1 - cover) + colour * cover).astype(np.uint8))
