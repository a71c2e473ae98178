"""One object of VisA: Data/Images/{Normal,Anomaly}, Data/Masks/Anomaly, image_anno.csv, and VisA's split_csv/1cls.csv.

Both tables name images from the data set's root, `candle/Data/Images/...`: the first part is the object. Masks hold
numbers of defects, not black and white. The split of 1cls.csv is kept.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from wtflow.data.manifest import PrepareParams
from wtflow.data.sources.source_image import SourceImage, group_of, need_folders
from wtflow.data.sources.table import rows
from wtflow.errors import WTFlowError

ANNOTATIONS = "image_anno.csv"
SPLIT = "split_csv/1cls.csv"


def images(raw: Path, params: PrepareParams) -> Iterator[SourceImage]:
    """One image a row of 1cls.csv that is about this object."""
    need_folders(raw, "visa", "Data/Images/Normal", "Data/Images/Anomaly")
    defects = {row["image"]: row["label"] for _, row in rows(raw / ANNOTATIONS, "visa", ("image", "label", "mask"))}
    objects = {PurePosixPath(path).parts[0] for path in defects if path}
    if len(objects) != 1:
        raise WTFlowError(f"{raw / ANNOTATIONS}: has to name images of one object, found {sorted(objects)}.")
    (name,) = objects
    found = False
    for where, row in rows(raw / SPLIT, "visa", ("object", "split", "label", "image", "mask")):
        if row["object"] == name:
            found = True
            yield _image(row, defects.get(row["image"], ""), where, params)
    if not found:
        raise WTFlowError(
            f"{raw / SPLIT}: no row of object {name}, of which {ANNOTATIONS} is. Copy VisA's own 1cls.csv."
        )


def _image(row: dict[str, str], defect: str, where: str, params: PrepareParams) -> SourceImage:
    path, mask = (_inside(row[column], row["object"], where) for column in ("image", "mask"))
    group = group_of(path, params)
    match row["split"], row["label"]:
        case ("train" | "test") as split, "normal" if defect in ("", "normal"):
            return SourceImage(path, group, split, "normal", "", None)
        case "test", "anomaly" if defect != "normal":
            return SourceImage(path, group, "test", "anomalous", defect or "defective", mask or None)
    raise WTFlowError(
        f"{where}: split {row['split']}, label {row['label']} and {ANNOTATIONS}'s label {defect!r} do not go together: "
        "1cls.csv trains on normal images alone. Copy both from VisA anew."
    )


def _inside(path: str, name: str, where: str) -> str:
    """The path seen from the object's folder; "" stays."""
    if path and not path.startswith(f"{name}/"):
        raise WTFlowError(f"{where}: {path!r} is not below {name}/. Copy VisA's own 1cls.csv.")
    return path.removeprefix(f"{name}/")
