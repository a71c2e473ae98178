"""The plainest layout: good/, and bad/ if there are defects to test with; a folder in bad/ names a defect.

Masks, for as many images of bad/ as have one, lie below masks/ as the images lie below bad/: masks/<defect>/<stem>.png,
or <stem>_mask.png.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from wtflow.data.manifest import PrepareParams
from wtflow.data.sources.source_image import SourceImage, group_of, is_there, need_folders
from wtflow.data.tree import files, visible

KNOWN = ("good", "bad", "masks")


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


def stray(raw: Path, path: str) -> str | None:
    """Why the image file at `path` was passed over, and where it would be taken; None if this layout does not know."""
    place = PurePosixPath(path)
    top = place.parts[0]
    if len(place.parts) == 1:
        return "lies flat: photographs belong below good/, those with a defect below bad/"
    if top == "masks":
        return _stray_mask(raw, place)
    if top.lower() in KNOWN and top not in KNOWN:
        return f"the folder {top}/ has to be named {top.lower()}/"
    return f"defects belong below bad/: if {top}/ is one, move it to bad/{top}/"


def _stray_mask(raw: Path, place: PurePosixPath) -> str | None:
    """Why a file below masks/ is the mask of no photograph."""
    below = place.relative_to("masks")
    stem, folder = below.stem.removesuffix("_mask"), PurePosixPath("bad") / below.parent
    faults = []
    if not any(other.stem in (stem, below.stem) for other in (raw / folder).glob("*") if visible(other.name)):
        faults.append(f"lies among the masks, but there is no photograph {folder / stem}.* for it")
    if below.suffix != ".png":
        faults.append("a mask has to be a PNG file whose name ends in .png")
    return "; ".join(faults) or None


def _mask(raw: Path, path: str) -> str | None:
    place = PurePosixPath("masks") / PurePosixPath(path).relative_to("bad")
    masks = (place.with_name(f"{place.stem}{end}.png").as_posix() for end in ("", "_mask"))
    return next((mask for mask in masks if is_there(raw, mask)), None)
