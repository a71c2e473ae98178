"""The layouts that `prepare.layout` may name. A new one: a module here, a name in `Layout`, a line below."""

from collections.abc import Mapping

from wtflow.data.manifest import Layout
from wtflow.data.sources import elpv, folder, mvtec_ad
from wtflow.data.sources.source_image import Source

LAYOUTS: Mapping[Layout, Source] = {
    "elpv": elpv.images,
    "mvtec_ad": mvtec_ad.images,
    "folder": folder.images,
}
