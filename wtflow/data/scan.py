"""Every image of a raw folder read once: is it whole, how large is it, which bytes are it?"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wtflow.data.images import ImageLimits
from wtflow.data.looks import Looks
from wtflow.data.masks import SATURATIONS, mask_files, read_marks, read_saturations
from wtflow.data.sources.source_image import SourceImage
from wtflow.data.version import md5_bytes
from wtflow.errors import ImageError

MOST_THREADS = 8
PIECE = 32
"""Images that a thread looks at in one go: of small ones the change from thread to thread costs more than the look."""
DVC_CACHED = re.compile(r".*/files/md5/[0-9a-f]{2}/[0-9a-f]{30}")


@dataclass(frozen=True)
class Rejection:
    """An image that was found and is not used.

    `reason` is one of `ImageError`'s or `outside`, `linked_folder`, `unreadable`, `no_group`, `bad_mask`,
    `duplicate`, `contradictory`, `not_in_layout`.
    """

    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Scanned:
    """An image that was read and decoded whole."""

    source: SourceImage
    image_id: str
    width: int
    height: int
    fault: Rejection | None
    """Why it is of no use all the same: its mask, its group."""
    marked: bool
    """Whether its mask marks a pixel."""
    md5s: dict[str, str]
    """Of every file read for it, by path."""
    thumbnail_YX: NDArray[np.uint8] = field(compare=False)
    """See `wtflow.data.likeness`."""


def scan(
    raw: Path, sources: Sequence[SourceImage], limits: ImageLimits, looks: Looks | None = None
) -> Iterator[Scanned | Rejection]:
    """Read and hash every image of `raw`, and decode those that `looks` does not know, a few at once; outcomes in the
    order of `sources`."""
    root, seen = raw.resolve(), looks or Looks(limits)
    folder = _Folder(root, limits)
    kinds = read_saturations(root) if (root / SATURATIONS).is_file() else {}
    pieces = [sources[start : start + PIECE] for start in range(0, len(sources), PIECE)]

    def look(piece: Sequence[SourceImage]) -> list[Scanned | Rejection]:
        return [_scan_one(folder, source, kinds, seen) for source in piece]

    with ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for outcomes in pool.map(look, pieces):
            yield from outcomes


class _Folder:
    """A raw folder, from which files of at most some bytes are read. Each folder in it is resolved once."""

    def __init__(self, root: Path, limits: ImageLimits) -> None:
        self.root, self.limits = root, limits
        self._resolved = cache(lambda folder: (root / folder).resolve().as_posix())

    def read(self, path: str) -> bytes:
        """The bytes of a file in the folder, or in the DVC cache it is linked to; at most one over the limit."""
        if storable(path) != path:
            raise ImageError("unreadable", "its name is not UTF-8: rename it")
        place = self.root / path
        try:
            target = self._target(path, place)
            if not f"{target}/".startswith(f"{self.root}/") and not DVC_CACHED.fullmatch(target):
                raise ImageError("outside", f"leads out of the folder, to {target}: copy the image here")
            if not place.is_file():
                raise ImageError("unreadable", "not there" if not place.exists() else "not a regular file")
            with place.open("rb") as file:
                return file.read(self.limits.max_bytes + 1)
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # the latter two: a circle of links, a NUL in the name
            raise ImageError("unreadable", f"cannot be read: {error}") from None

    def _target(self, path: str, place: Path) -> str:
        """Where the file lies."""
        above, _, name = path.rpartition("/")
        if place.is_symlink() or name in ("", ".", ".."):
            return place.resolve().as_posix()
        return f"{self._resolved(above)}/{name}"


def _scan_one(folder: _Folder, source: SourceImage, kinds: Collection[int], looks: Looks) -> Scanned | Rejection:
    try:
        data = folder.read(source.path)
        look = looks.at(data)
    except ImageError as error:
        return Rejection(storable(source.path), error.reason, str(error))
    size = look.width, look.height
    md5s = {source.path: md5_bytes(data)}
    fault, marked = None, False
    if not source.group:
        fault = Rejection(source.path, "no_group", "prepare.group_pattern finds no group in its name")
    if source.mask_path:
        try:
            marked = _check_masks(folder, source.mask_path, size, kinds, md5s)
        except ImageError as error:
            fault = Rejection(source.path, "bad_mask", storable(str(error)))
    return Scanned(source, look.image_id, *size, fault, marked, md5s, look.thumbnail_YX)


def _check_masks(
    folder: _Folder, mask_path: str, size: tuple[int, int], kinds: Collection[int], md5s: dict[str, str]
) -> bool:
    """Whether any pixel is marked. Notes the MD5 of the files read; a file of no use is an `ImageError`."""
    try:
        paths, marked = mask_files(folder.root, mask_path), False
    except OSError as error:
        raise ImageError("bad_mask", f"{mask_path}: cannot be read: {error}") from None
    if not paths:
        raise ImageError("bad_mask", f"{mask_path}: no mask in this folder")
    for path in paths:
        try:
            data = folder.read(path)
            marks = read_marks(data, folder.limits)
            md5s[path] = md5_bytes(data)  # behind it, for bytes that are cut off at the limit are refused
        except ImageError as error:
            raise ImageError("bad_mask", f"{path}: {error}") from None
        height, width = marks.pixels_YX.shape
        if (width, height) != size:
            raise ImageError("bad_mask", f"{path}: {width} x {height} pixels, its image {size[0]} x {size[1]}")
        if kinds and marks.level and paths != [mask_path] and marks.level not in kinds:
            raise ImageError("bad_mask", f"{path}: grey level {marks.level} is no pixel_value of {SATURATIONS}")
        marked = marked or bool(marks.pixels_YX.any())
    return marked


def storable(path: str) -> str:
    """`path` itself if it is UTF-8, else with the odd bytes escaped."""
    return path.encode("utf-8", "backslashreplace").decode()
