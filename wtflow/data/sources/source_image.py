"""What a layout says about an image, before anybody has opened it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from wtflow.data.manifest import Label, PrepareParams, Split
from wtflow.data.tree import is_image, visible
from wtflow.errors import WTFlowError

MOST_TOLD = 6
"""Folders that an error names."""


@dataclass(frozen=True)
class SourceImage:
    """One image of a raw folder. Paths are relative to it, with slashes."""

    path: str
    group: str
    """Images that may not be parted between train, calibrate and test; "" if its name does not tell."""
    split: Split | None
    """The data set's own split, None where it has none. `train` is cut into train and calibrate if no image of the
    data set is in `calibrate`."""
    label: Label
    defect: str
    """Kind of defect, "" for normal."""
    mask_path: str | None
    """Where the mask has to be: a file, or a folder with a file a region; None where the layout has no mask for this
    image."""


Source = Callable[[Path, PrepareParams], Iterator[SourceImage]]
"""A layout: every image it finds in the raw folder. A folder of another layout raises `WTFlowError`."""


def group_of(path: str, params: PrepareParams) -> str:
    """The group that a name tells: what `group_pattern` finds ("" if nothing), or the file itself."""
    place = PurePosixPath(path)
    if params.group_pattern is None:
        return place.with_suffix("").as_posix()
    match = re.search(params.group_pattern, place.stem)
    return (match[1] or "") if match else ""


def is_there(raw: Path, path: str) -> bool:
    """Whether anything is at `path` in `raw`. Nothing is at a name that is too long, or that may not be looked at."""
    try:
        return (raw / path).exists()
    except OSError:
        return False


def need_folders(raw: Path, layout: str, *folders: str) -> None:
    """Raise unless `raw` has these folders."""
    for folder in folders:
        if not (raw / folder).is_dir():
            raise WTFlowError(
                f"{raw}: no folder {folder}/, which layout {layout} needs; found: {_content(raw)}. "
                "Add it, or name the layout."
            )


def _content(folder: Path) -> str:
    """The first folders in `folder` with a slash, and how many image files lie flat in it: for an error."""
    names = sorted(place.name for place in folder.iterdir() if place.is_dir() and visible(place.name))
    images = sum(is_image(place.name) for place in folder.iterdir() if place.is_file())
    told = [f"{name}/" for name in names[:MOST_TOLD]] + ["..."] * (len(names) > MOST_TOLD)
    return ", ".join([*told, *([f"{images} image files that lie flat"] if images else [])]) or "nothing of use"
