"""The layouts that `prepare.layout` may name. A new one: a module here, a name in `Layout`, a line below."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from wtflow.data.manifest import Layout
from wtflow.data.sources import csv_table, elpv, folder, mpdd, mvtec_3d, mvtec_ad, mvtec_ad_2, mvtec_loco, visa
from wtflow.data.sources.source_image import Source

LAYOUTS: Mapping[Layout, Source] = {
    "elpv": elpv.images,
    "mvtec_ad": mvtec_ad.images,
    "mpdd": mpdd.images,
    "visa": visa.images,
    "mvtec_loco": mvtec_loco.images,
    "mvtec_3d": mvtec_3d.images,
    "mvtec_ad_2": mvtec_ad_2.images,
    "folder": folder.images,
    "csv": csv_table.images,
}

PASSED_OVER: Mapping[Layout, re.Pattern[str]] = {
    "mvtec_3d": mvtec_3d.PASSED_OVER,
    "mvtec_ad_2": mvtec_ad_2.PASSED_OVER,
}
"""Paths of image files that are no photographs of the line, or have no label, and are not reported as strays."""

STRAYS: Mapping[Layout, Callable[[Path, str], str | None]] = {"folder": folder.stray}
"""What a layout says of an image file in the raw folder that it gave no meaning; None: nothing in particular."""
