"""Every image of a raw folder read once: is it whole, how large is it, which bytes are it?"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from wtflow.artefact import sha256_bytes
from wtflow.data.images import ImageLimits, decode
from wtflow.data.sources.source_image import SourceImage
from wtflow.data.version import md5_bytes
from wtflow.errors import ImageError

THREADS = 4
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
    md5s: dict[str, str]
    """Of every file read for it, by path."""


def scan(raw: Path, sources: Sequence[SourceImage], limits: ImageLimits) -> Iterator[Scanned | Rejection]:
    """Read, hash and decode every image of `raw`, a few at once; outcomes in the order of `sources`."""
    root = raw.resolve()
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda source: _scan_one(root, source, limits), sources)


def _scan_one(root: Path, source: SourceImage, limits: ImageLimits) -> Scanned | Rejection:
    try:
        data = _read(root, source.path, limits)
        width, height = decode(data, limits).size
    except ImageError as error:
        return Rejection(storable(source.path), error.reason, str(error))
    md5s = {source.path: md5_bytes(data)}
    fault = None
    if not source.group:
        fault = Rejection(source.path, "no_group", "prepare.group_pattern finds no group in its name")
    if source.mask_path:
        try:
            mask = _read(root, source.mask_path, limits)
            md5s[source.mask_path] = md5_bytes(mask)
            _check_mask(decode(mask, limits).size, (width, height))
        except ImageError as error:
            fault = Rejection(source.path, "bad_mask", f"{source.mask_path}: {error}")
    return Scanned(source, sha256_bytes(data), width, height, fault, md5s)


def _check_mask(size: tuple[int, int], image_size: tuple[int, int]) -> None:
    if size != image_size:
        raise ImageError("bad_mask", "{} x {} pixels, its image {} x {}".format(*size, *image_size))


def _read(root: Path, path: str, limits: ImageLimits) -> bytes:
    """The bytes of a file in `root`, or in the DVC cache it is linked to; at most one over the limit."""
    if storable(path) != path:
        raise ImageError("unreadable", "its name is not UTF-8: rename it")
    place = root / path
    try:
        target = place.resolve()
        if not target.is_relative_to(root) and not DVC_CACHED.fullmatch(target.as_posix()):
            raise ImageError("outside", f"leads out of the folder, to {target}: copy the image here")
        if not place.is_file():
            raise ImageError("unreadable", "not there" if not place.exists() else "not a regular file")
        with place.open("rb") as file:
            return file.read(limits.max_bytes + 1)
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # the latter two: a circle of links, a NUL in the name
        raise ImageError("unreadable", f"cannot be read: {error}") from None


def storable(path: str) -> str:
    """`path` itself if it is UTF-8, else with the odd bytes escaped."""
    return path.encode("utf-8", "backslashreplace").decode()
