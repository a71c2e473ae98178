"""The plainest layout: good/, and bad/ if there are defects to test with; a folder in bad/ names a defect."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from wtflow.data.manifest import PrepareParams
from wtflow.data.sources.source_image import SourceImage, group_of
from wtflow.data.tree import files, visible
from wtflow.errors import WTFlowError


def images(raw: Path, params: PrepareParams) -> Iterator[SourceImage]:
    """Every visible file of good/ and bad/, sub-folders included. No split of its own, no masks."""
    if not (raw / "good").is_dir():
        raise WTFlowError(f"{raw}: no folder good/, which layout folder needs. Add it, or name the layout.")
    for path in filter(visible, files(raw)):
        match PurePosixPath(path).parts:
            case ("good", _, *_):
                yield SourceImage(path, group_of(path, params), None, "normal", "", None)
            case ("bad", _):
                yield SourceImage(path, group_of(path, params), None, "anomalous", "defective", None)
            case ("bad", defect, _, *_):
                yield SourceImage(path, group_of(path, params), None, "anomalous", defect, None)
