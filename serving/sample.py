"""A photograph to try a line with, and the command that does."""

import shlex
from pathlib import Path

from serving.resolve import Champion
from wtflow.data.tree import IMAGE_SUFFIXES
from wtflow.errors import WTFlowError

RAW, PREPARED = Path("data/raw"), Path("data/prepared")
PLACEHOLDER = Path("photo.png")


def sample_image(champion: Champion, raw: Path = RAW, prepared: Path = PREPARED) -> Path | None:
    """The version's tag `sample_image`, else a test image of the line, else any raw image of it."""
    if champion.sample_image and Path(champion.sample_image).is_file():
        return Path(champion.sample_image).resolve()
    folder = (raw / champion.line).resolve()
    tested = _first_test_image(folder, prepared / champion.line / "manifest.parquet")
    return tested or next((path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES), None)


def curl(url: str, line: str, image: Path | None) -> str:
    """A shell line that scores `image`; with a placeholder to be replaced when there is none."""
    body = shlex.quote(f"@{image or PLACEHOLDER}")
    return f"curl --silent --show-error --data-binary {body} {shlex.quote(f'{url}/v1/lines/{line}/score')}"


def _first_test_image(folder: Path, manifest: Path) -> Path | None:
    """The first anomalous test image that is on disk, else the first normal one."""
    if not manifest.is_file():
        return None
    from wtflow.data.manifest import Manifest  # brings torch

    try:
        rows = Manifest.read(manifest).rows("test")
    except WTFlowError:  # a manifest of another version: any image will do
        return None
    ordered = sorted(rows, key=lambda row: (row["label"] != "anomalous", row["path"]))
    return next((folder / row["path"] for row in ordered if (folder / row["path"]).is_file()), None)
