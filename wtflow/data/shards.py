"""Feature shards: what the backbone saw of a split, on disk, memory-mapped. A folder holds

* `index.json`: format, data version, backbone and its digest, levels, counts, SHA-256 of every other file;
* `index.parquet`: one row an image or copy of one, sorted by image_id: the manifest's columns, partition and row;
* `part-00000.safetensors`, ...: {"level2": n x C x H x W float16, "level3": ...}, in the order of the index;
* `rejected.parquet`: one row an image of the manifest that could not be read again, in the columns of prepare's table;
* `backbone.safetensors`: the weights that made them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from wtflow.artefact import digest_of, read_json, sha256_file, write_json
from wtflow.errors import DigestError, WTFlowError

FORMAT = 2
REJECTED = "rejected.parquet"
COPY = "copy"
"""Split of the varied copies of training images (`wtflow.features.augment`)."""


@dataclass(frozen=True)
class FeatureShards:
    """One split's features. Rows are numbered 0 to len - 1 in the order of `index`.

    `batch` copies only the rows asked for; the rest stays on disk until it is touched.
    """

    folder: Path
    header: dict[str, Any]
    index: pa.Table

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> "FeatureShards":
        """Open a folder that `seal` closed. `verify` reads every file once and compares its SHA-256."""
        header = read_json(folder / "index.json")
        found = header.get("format") if isinstance(header, dict) else None
        if found != FORMAT:
            raise WTFlowError(f"{folder / 'index.json'}: format {found}, this version reads {FORMAT}. Extract again.")
        for name, digest in header["files"].items() if verify else ():
            path = folder / name
            if not path.is_file() or sha256_file(path) != digest:
                raise DigestError(
                    f"{path}: missing or not the bytes that were written. Type: dvc repro --force extract"
                )
        return cls(folder, header, pq.read_table(folder / "index.parquet"))

    def __len__(self) -> int:
        return int(self.index.num_rows)

    @property
    def levels(self) -> tuple[int, ...]:
        """Backbone levels, fine to coarse."""
        return tuple(self.header["levels"])

    @property
    def data_version(self) -> str:
        """DVC's hash of the raw images."""
        return str(self.header["data_version"])

    @property
    def digest(self) -> str:
        """Identity of the features: every file's digest and the header."""
        return digest_of(self.header)

    @cached_property
    def _parts(self) -> list[dict[int, Tensor]]:
        parts = []
        for number in range(self.header["partitions"]):
            with safe_open(self.folder / part_name(number), framework="pt") as file:
                parts.append({int(name.removeprefix("level")): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return parts

    @cached_property
    def _places(self) -> np.ndarray:
        return np.stack([self.index["partition"].to_numpy(), self.index["row"].to_numpy()], axis=1)

    def batch(self, rows: Sequence[int]) -> dict[int, Tensor]:
        """Feature maps of some rows, in their order: {level: len(rows) x C x H x W float16}."""
        places = self._places[np.asarray(rows, dtype=np.int64)]
        return {level: torch.stack([self._parts[part][level][row] for part, row in places]) for level in self.levels}

    def batches(self, rows: Sequence[int], size: int) -> Iterator[dict[int, Tensor]]:
        """`batch` of consecutive pieces of `rows`, the last one shorter."""
        for start in range(0, len(rows), size):
            yield self.batch(rows[start : start + size])

    def rows(self, **wanted: str) -> list[int]:
        """Rows whose columns have the given values: `rows(split="train")`."""
        keep = pa.array(np.ones(len(self), dtype=bool))
        for column, value in wanted.items():
            keep = pc.and_(keep, pc.equal(self.index[column], value))
        found: list[int] = np.flatnonzero(np.asarray(keep)).tolist()
        return found

    def training_rows(self) -> list[int]:
        """Rows to train on: the images of the split `train`, and their copies if there are some."""
        return sorted(self.rows(split="train") + self.rows(split=COPY))


def part_name(number: int) -> str:
    """File name of a partition."""
    return f"part-{number:05d}.safetensors"


def seal(
    folder: Path, index: pa.Table, levels: Sequence[int], facts: dict[str, Any], known: Mapping[str, str] | None = None
) -> None:
    """Write the index of a folder whose partitions are all there; without it the folder does not open. `known`: the
    SHA-256 of files that were read and hashed just before, by name."""
    pq.write_table(index, folder / "index.parquet", compression="zstd")
    partitions = (pc.max(index["partition"]).as_py() + 1) if index.num_rows else 0
    names = [part_name(number) for number in range(partitions)]
    known = known or {}
    files = {
        name: known[name] if name in known else sha256_file(folder / name)
        for name in [*names, "index.parquet", REJECTED, "backbone.safetensors"]
    }
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()  # of an earlier run with more partitions, or half written
    header = {
        "format": FORMAT,
        "levels": list(levels),
        "partitions": partitions,
        "images": index.num_rows,
        "files": files,
        **facts,
    }
    write_json(folder / "index.json", header)
