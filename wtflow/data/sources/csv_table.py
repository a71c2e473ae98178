"""Any folder of images with a table that names them: images.csv (path, label; if wanted group, mask, defect, split).

`label` is normal, anomalous or uncertain; `mask` a file, or a folder with a file for each region; `split`
train, calibrate, test or empty, which leaves the choice to the group's hash.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar, get_args

from wtflow.data.manifest import Label, PrepareParams, Split
from wtflow.data.sources.source_image import SourceImage, group_of
from wtflow.data.sources.table import place_of, rows
from wtflow.errors import WTFlowError

TABLE = "images.csv"

T = TypeVar("T", bound=str)


def images(raw: Path, params: PrepareParams) -> Iterator[SourceImage]:
    """One image a row, each path once."""
    seen: dict[str, str] = {}
    for where, row in rows(raw / TABLE, "csv", ("path", "label"), ("group", "mask", "defect", "split")):
        path = place_of("path", row, where, TABLE)
        if path in seen:
            raise WTFlowError(f"{where}: path is {path!r}, as in {seen[path]}. Name each image in one row.")
        seen[path] = where
        yield _image(path, row, where, params)


def _image(path: str, row: dict[str, str], where: str, params: PrepareParams) -> SourceImage:
    label = _one_of(get_args(Label), "label", row, where)
    split = _one_of(get_args(Split), "split", row, where) if row["split"] else None
    if label != "normal" and split not in (None, "test"):
        raise WTFlowError(f"{where}: {label} images are test images, split says {split}. Leave it empty, or say test.")
    if label == "normal" and (row["mask"] or row["defect"]):
        raise WTFlowError(f"{where}: a normal image has neither mask nor defect. Empty them, or change the label.")
    defect = row["defect"] or ("defective" if label == "anomalous" else "")
    mask = place_of("mask", row, where, TABLE) if row["mask"] else None
    return SourceImage(path, row["group"] or group_of(path, params), split, label, defect, mask)


def _one_of(values: tuple[T, ...], column: str, row: dict[str, str], where: str) -> T:
    for value in values:
        if row[column] == value:
            return value
    raise WTFlowError(f"{where}: {column} has to be one of {', '.join(values)}, found {row[column]!r}.")
