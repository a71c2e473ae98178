"""The plainest layout: good/, and bad/ if there are defects to test with; a folder in bad/ names a defect.

Masks, for as many images of bad/ as have one, lie below masks/ as the images lie below bad/: masks/<defect>/<stem>.png,
or <stem>_mask.png.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from wtflow.data.manifest import PrepareParams
from wtflow.data.sources.source_image import SourceImage, group_of, need_folders
from wtflow.data.tree import files, visible


def images(raw: Path, params: PrepareParams) -> Iterator[SourceImage]:
    """Every visible file of good/ and bad/, sub-folders included. No split of its own."""
    need_folders(raw, "folder", "good")
    for path in filter(visible, files(raw)):
        match PurePosixPath(path).parts:
            case ("good", _, *_):
                yield SourceImage(path, group_of(path, params), None, "normal", "", None)
            case ("bad", _):
                yield SourceImage(path, group_of(path, params), None, "anomalous", "defective", _mask(raw, path))
            case ("bad", defect, _, *_):
                yield SourceImage(path, group_of(path, params), None, "anomalous", defect, _mask(raw, path))


def _mask(raw: Path, path: str) -> str | None:
    place = PurePosixPath("masks") / PurePosixPath(path).relative_to("bad")
    names = (f"{place.stem}.png", f"{place.stem}_mask.png")
    return next((place.with_name(name).as_posix() for name in names if (raw / place.with_name(name)).exists()), None)
