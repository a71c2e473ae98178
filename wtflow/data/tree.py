"""What lies in a folder of raw images, seen as DVC sees it."""

import os
from pathlib import Path
from typing import NoReturn

from wtflow.errors import WTFlowError

NOT_DATA = frozenset({".git", ".hg", ".dvc"})
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def files(folder: Path) -> list[str]:
    """Every file below `folder`, links to files too, not what is behind linked folders. Relative, sorted. Raises
    `WTFlowError` for a folder that cannot be listed."""
    return _walk(folder)[0]


def linked_folders(folder: Path) -> list[str]:
    """Links to folders below `folder`. Nothing behind them is data: DVC does not follow them either."""
    return _walk(folder)[1]


def visible(path: str) -> bool:
    """Whether no part of the path begins with a dot."""
    return not path.startswith(".") and "/." not in path


def is_image(path: str) -> bool:
    """Whether the name is that of a visible image file; what is inside has to be seen."""
    return visible(path) and path.lower().endswith(IMAGE_SUFFIXES)


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    found, links = [], []
    for top, folders, names in os.walk(folder, onerror=_refuse):
        place = "" if Path(top) == folder else f"{Path(top).relative_to(folder).as_posix()}/"
        links += [place + name for name in folders if Path(top, name).is_symlink()]
        found += [place + name for name in names if name not in NOT_DATA]
        folders[:] = [name for name in folders if name not in NOT_DATA]
    return sorted(found), sorted(links)


def _refuse(error: OSError) -> NoReturn:
    raise WTFlowError(
        f"{error.filename}: this folder cannot be listed ({error.strerror}). Mend its permissions, or take it out of "
        "the folder above."
    ) from None
