"""The manifest: one row for each usable image of a line, saying what it is and which split may see it.

Its companion, the table of rejected images, has a row for every other one: together they are all
that was found. docs/data-contracts.md explains every column.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from wtflow.artefact import digest_of, replacing, sha256_bytes
from wtflow.data.images import ImageLimits
from wtflow.errors import DigestError, WTFlowError
from wtflow.params import Section

Split = Literal["train", "calibrate", "test"]
Label = Literal["normal", "anomalous", "uncertain"]
Layout = Literal[
    "elpv", "mvtec_ad", "mpdd", "visa", "mvtec_loco", "mvtec_3d", "mvtec_ad_2", "folder", "csv"
]  # fmt: skip
Share = Annotated[float, Field(ge=0.0, lt=1.0)]

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("line", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("defect", pa.string(), nullable=False),
        pa.field("mask_path", pa.string(), nullable=True),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)
"""image_id: SHA-256 of the file's bytes; path, mask_path: relative to the raw folder; defect: "" for normal;
width, height: pixels of the upright image."""

REJECTED_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("path", "line", "reason", "detail")]
)
"""reason: a stable word; detail: what exactly, for a person."""

FINDINGS_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("path", "line", "finding", "detail")]
)
"""What a person should know of images that are used: finding is a stable word, detail says what exactly."""


class PrepareParams(Section):
    """How raw images become a manifest."""

    layout: Layout
    """How the raw folder is arranged: a module of `wtflow.data.sources`."""
    test_fraction: Share
    """Share of the groups whose normals are test images, where the data set has no split of its own."""
    calibrate_fraction: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Share of the groups whose normals calibrate the threshold: of all groups, or of those in the data set's own
    train split. Not used where the data set has a validation split: that one calibrates."""
    salt: str
    """Another salt draws another split."""
    group_block: Annotated[int, Field(gt=0)]
    """elpv: so many consecutive cells are one group."""
    group_pattern: str | None = None
    """All but elpv: a regular expression searched in the file name without its suffix; its first bracket
    is the group (part, view, lot). Without it every image is a group of its own."""
    max_rejected_fraction: Annotated[float, Field(ge=0.0, le=1.0)]
    """The stage stops when a larger share of the images found is rejected."""
    limits: ImageLimits = ImageLimits()
    """What is accepted as an image, here and in the service."""

    @field_validator("group_pattern")
    @classmethod
    def _one_bracket(cls, pattern: str | None) -> str | None:
        try:
            brackets = 1 if pattern is None else re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if brackets < 1:
            raise ValueError(r'needs a bracket around the group, as in "(view\d+)"')
        return pattern

    @model_validator(mode="after")
    def _some_left_to_train(self) -> Self:
        if self.test_fraction + self.calibrate_fraction >= 1.0:
            raise ValueError("test_fraction + calibrate_fraction leaves no group to train on: keep the sum below 1")
        return self


@dataclass(frozen=True)
class Manifest:
    """A line's images, sorted by `image_id`, columns as in `MANIFEST_SCHEMA`."""

    table: pa.Table
    line: str
    data_version: str
    """DVC's hash of the raw folder: `<md5>.dir`."""

    @classmethod
    def of_rows(cls, rows: Iterable[Mapping[str, Any]], line: str, data_version: str) -> Self:
        """Rows in any order; the same rows give the same manifest, and the same bytes on disk."""
        ordered = sorted(rows, key=lambda row: str(row["image_id"]))
        return cls(pa.Table.from_pylist(ordered, schema=MANIFEST_SCHEMA), line, data_version)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every row, the line and the data version."""
        return digest_of({"line": self.line, "data_version": self.data_version, "rows": self.table.to_pylist()})

    def rows(self, *splits: Split) -> list[dict[str, Any]]:
        """The rows of some splits, in order; of all when none is named."""
        return [row for row in self.table.to_pylist() if not splits or row["split"] in splits]

    def write(self, path: Path) -> None:
        """Write a Parquet file in one step."""
        facts = {"line": self.line, "data_version": self.data_version, "digest": self.digest}
        note = {b"wtflow": json.dumps(facts, sort_keys=True).encode()}
        write_table(self.table.replace_schema_metadata(note), path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote; changed rows raise a `DigestError`."""
        table = _read(path, MANIFEST_SCHEMA)
        try:
            facts = json.loads(table.schema.metadata[b"wtflow"])
            manifest = cls(table.replace_schema_metadata(None), facts["line"], facts["data_version"])
            recorded = facts["digest"]
        except (KeyError, TypeError, ValueError):
            raise WTFlowError(
                f"{path}: carries no note of its line and data version. Type: dvc repro prepare"
            ) from None
        if manifest.digest != recorded:
            raise DigestError(f"{path}: its rows are not those that were written. Type: dvc repro --force prepare")
        return manifest


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table, such as one of `REJECTED_SCHEMA` or `FINDINGS_SCHEMA`, in one step."""
    with replacing(path) as draft:
        pq.write_table(table, draft, compression="zstd")


def read_rejected(path: Path) -> pa.Table:
    """Read a table of `REJECTED_SCHEMA`."""
    return _read(path, REJECTED_SCHEMA)


def split_of(group: str, params: PrepareParams) -> Split:
    """The split of a group's normals: a matter of its name, the salt and the shares, not of other groups."""
    place = _place(group, params.salt)
    if place < params.test_fraction:
        return "test"
    return "calibrate" if place < params.test_fraction + params.calibrate_fraction else "train"


def cut_from_train(group: str, params: PrepareParams) -> Split:
    """The same where the data set has its own `test`: only `calibrate` has to be found."""
    return "calibrate" if _place(group, params.salt) < params.calibrate_fraction else "train"


def _place(group: str, salt: str) -> float:
    """Uniform in [0, 1): a fixed place for each group."""
    return int(sha256_bytes(f"{salt}:{group}".encode()), 16) / 2.0**256


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(path, partitioning=None)
    except FileNotFoundError:
        raise WTFlowError(f"{path}: not there. Type: dvc repro prepare") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise WTFlowError(f"{path}: not a whole Parquet file ({error}). Type: dvc repro --force prepare") from None
    if not table.schema.equals(schema, check_metadata=False):
        raise WTFlowError(f"{path}: has other columns than this version writes. Type: dvc repro --force prepare")
    return table
