"""The layout of MVTec AD: train/good, test/good, test/<defect>, ground_truth/<defect>/<stem>_mask.png.

The data set's own split is kept. A defect without a folder in ground_truth/ has no masks; one with a folder
needs a mask for every image.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from wtflow.data.manifest import PrepareParams
from wtflow.data.sources.source_image import SourceImage, group_of, need_folders
from wtflow.data.tree import files, visible


def images(raw: Path, params: PrepareParams) -> Iterator[SourceImage]:
    """Every visible file of train/good and test/<any>. Masks may be empty (all 0)."""
    need_folders(raw, params.layout, "train/good", "test")
    for path in filter(visible, files(raw)):
        match PurePosixPath(path).parts:
            case ("train", "good", _, *_):
                yield SourceImage(path, group_of(path, params), "train", "normal", "", None)
            case ("test", "good", _, *_):
                yield SourceImage(path, group_of(path, params), "test", "normal", "", None)
            case ("test", defect, _, *_):
                mask = _mask(raw, path, defect)
                yield SourceImage(path, group_of(path, params), "test", "anomalous", defect, mask)


def _mask(raw: Path, path: str, defect: str) -> str | None:
    if not (raw / "ground_truth" / defect).is_dir():
        return None
    below = PurePosixPath(path).relative_to("test")
    return (PurePosixPath("ground_truth") / below.with_name(f"{below.stem}_mask.png")).as_posix()
