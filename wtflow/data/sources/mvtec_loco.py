"""The layout of MVTec LOCO AD: {train,validation,test}/good, test/{logical,structural}_anomalies, defects_config.json,
and ground_truth/<defect>/<stem>/ with a mask for each region of an image.

The data set's own split is kept; its validation images calibrate.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from wtflow.data.manifest import PrepareParams
from wtflow.data.masks import SATURATIONS
from wtflow.data.sources.source_image import SourceImage, group_of, need_folders
from wtflow.data.tree import files, visible
from wtflow.errors import WTFlowError


def images(raw: Path, params: PrepareParams) -> Iterator[SourceImage]:
    """Every visible file of the three splits; an anomalous image's mask is a folder."""
    need_folders(raw, "mvtec_loco", "train/good", "validation/good", "test", "ground_truth")
    if not (raw / SATURATIONS).is_file():
        raise WTFlowError(f"{raw / SATURATIONS}: not there; sPRO needs it. Copy it from the data set's folder.")
    for path in filter(visible, files(raw)):
        group = group_of(path, params)
        match PurePosixPath(path).parts:
            case ("train", "good", _):
                yield SourceImage(path, group, "train", "normal", "", None)
            case ("validation", "good", _):
                yield SourceImage(path, group, "calibrate", "normal", "", None)
            case ("test", "good", _):
                yield SourceImage(path, group, "test", "normal", "", None)
            case ("test", defect, name):
                mask = f"ground_truth/{defect}/{PurePosixPath(name).stem}"
                yield SourceImage(path, group, "test", "anomalous", defect, mask)
