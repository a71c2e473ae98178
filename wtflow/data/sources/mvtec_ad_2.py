"""The layout of MVTec AD 2: {train,validation}/good, test_public/{good,bad}, and test_public/ground_truth/bad.

The data set's own split is kept; its validation images calibrate. The private test sets have no labels and are passed
over. A scene is photographed under several lights, <scene>_<light>.png: the scene is the group.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from wtflow.data.manifest import PrepareParams
from wtflow.data.sources.source_image import SourceImage, group_of, need_folders
from wtflow.data.tree import files, visible

PASSED_OVER = re.compile(r"test_private(_mixed)?/.+")


def images(raw: Path, params: PrepareParams) -> Iterator[SourceImage]:
    """Every visible file of train, validation and test_public."""
    need_folders(raw, "mvtec_ad_2", "train/good", "validation/good", "test_public")
    for path in filter(visible, files(raw)):
        group = _scene(path) if params.group_pattern is None else group_of(path, params)
        match PurePosixPath(path).parts:
            case ("train", "good", _):
                yield SourceImage(path, group, "train", "normal", "", None)
            case ("validation", "good", _):
                yield SourceImage(path, group, "calibrate", "normal", "", None)
            case ("test_public", "good", _):
                yield SourceImage(path, group, "test", "normal", "", None)
            case ("test_public", "bad", name):
                mask = f"test_public/ground_truth/bad/{PurePosixPath(name).stem}_mask.png"
                yield SourceImage(path, group, "test", "anomalous", "bad", mask)


def _scene(path: str) -> str:
    place = PurePosixPath(path)
    return (place.parent / place.stem.partition("_")[0]).as_posix()
