"""The layout of MVTec 3D-AD, photographs only: {train,validation}/good/rgb, test/<defect>/rgb, test/<defect>/gt.

The data set's own split is kept; its validation images calibrate. The point clouds in xyz/ and the empty masks of good
images are passed over.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from wtflow.data.manifest import PrepareParams
from wtflow.data.sources.source_image import SourceImage, group_of, need_folders
from wtflow.data.tree import files, visible

PASSED_OVER = re.compile(r"(train|validation|test)/[^/]+/xyz/[^/]+|test/good/gt/[^/]+")


def images(raw: Path, params: PrepareParams) -> Iterator[SourceImage]:
    """Every visible file of the folders rgb/."""
    need_folders(raw, "mvtec_3d", "train/good/rgb", "validation/good/rgb", "test")
    for path in filter(visible, files(raw)):
        group = group_of(path, params)
        match PurePosixPath(path).parts:
            case ("train", "good", "rgb", _):
                yield SourceImage(path, group, "train", "normal", "", None)
            case ("validation", "good", "rgb", _):
                yield SourceImage(path, group, "calibrate", "normal", "", None)
            case ("test", "good", "rgb", _):
                yield SourceImage(path, group, "test", "normal", "", None)
            case ("test", defect, "rgb", name):
                mask = f"test/{defect}/gt/{PurePosixPath(name).stem}.png"
                yield SourceImage(path, group, "test", "anomalous", defect, mask)
