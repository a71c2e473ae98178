"""Features that were computed once, kept under what they were computed from: no image goes twice through a backbone.

    key = (format of the shards, backbone digest, image_id)

The backbone digest covers network, weights, levels and image size. Decoder and resizer have no other setting that
changes a pixel; when their code does, `FORMAT` of `wtflow.data.shards` is raised (tests/features/test_cache.py). A
folder, which lines, checkouts and machines may share, holds

* `lock`: locked by whoever reads or writes, exclusively by whoever removes;
* `<format>-<backbone digest>/`, a `Shelf`:
    `backbone.json`: which network, for people;
    `<SHA-256 of the file>.safetensors`: {"level2": n x C x H x W float16, ...}, a partition as in data/features;
    `<the same>.json`: the image_id of each of its rows, and a digest over both.

No file ever changes. One whose name is not its digest counts as absent, so that what it held is computed again.
"""

import fcntl
import json
import logging
import os
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wtflow.artefact import digest_of, read_json, replacing, save_tensors, sha256_file, write_json
from wtflow.data.shards import FORMAT, FeatureShards, part_name
from wtflow.errors import WTFlowError
from wtflow.features.backbone import Backbone
from wtflow.features.links import link

UNFINISHED = "*.tmp*"
"""Left by a killed run: drafts of `replacing`, and .tmp and six letters, which safetensors writes and renames."""
OPEN_SHARDS = 256
"""Memory-mapped at a time."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where an image's features are."""

    shard: str
    """SHA-256 of the file."""
    row: int


@dataclass(frozen=True)
class FeatureCache:
    """The folder. Nothing is made before something is added."""

    folder: Path

    @contextmanager
    def held(self) -> Iterator[None]:
        """While it is read or written: nothing is removed. Waits for a removal that goes on.

        The system lets go when the process ends, however it ends. What killed ones left half written is swept by the
        first who comes alone.
        """
        with self._lock() as lock:
            if _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._sweep()
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While something is removed. Raises if a run holds the cache."""
        with self._lock() as lock:
            if not _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                raise WTFlowError(f"{self.folder}: a run uses it. Wait until the extraction has ended, then try again.")
            self._sweep()
            yield

    def shelf(self, backbone: Backbone) -> "Shelf":
        """Where the features of `backbone` are, or will be."""
        return self.shelf_of(backbone.digest, backbone.params.model_dump(mode="json"))

    def shelf_of(self, backbone_digest: str, settings: Mapping[str, Any]) -> "Shelf":
        """The same for a digest, and the settings that go with it."""
        shelf = Shelf(self.folder / f"{FORMAT}-{backbone_digest}")
        if not (shelf.folder / "backbone.json").is_file():
            write_json(shelf.folder / "backbone.json", settings)
        return shelf

    def shelves(self) -> list["Shelf"]:
        """Those that there are, in order of their names."""
        return [Shelf(path.parent) for path in sorted(self.folder.glob("*/backbone.json"))]

    @contextmanager
    def _lock(self) -> Iterator[int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield lock
        finally:
            os.close(lock)

    def _sweep(self) -> None:
        for path in self.folder.glob(f"*/{UNFINISHED}"):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Shelf:
    """The features of one backbone."""

    folder: Path

    @property
    def backbone_digest(self) -> str:
        """Of the network that made them."""
        return self.folder.name.partition("-")[2]

    @property
    def backbone(self) -> dict[str, Any]:
        """The settings of that network."""
        values: dict[str, Any] = read_json(self.folder / "backbone.json")
        return values

    def file(self, shard: str) -> Path:
        """Where a shard is."""
        return self.folder / f"{shard}.safetensors"

    def contents(self) -> Iterator[tuple[str, list[str]]]:
        """Shards, and the image_id of each of their rows. A damaged note is left out."""
        for path in self.notes():
            image_ids = noted(path)
            if image_ids is not None:
                yield path.stem, image_ids

    def find(self, image_ids: Collection[str], threads: int = 1) -> dict[str, Place]:
        """Those of the images that are here, in files that were read and found whole; a damaged one is reported and
        loses its note. The file stays, for another run may have put a whole one in its place meanwhile; that one's
        images are at worst computed once more."""
        wanted = set(image_ids)
        found: dict[str, Place] = {}
        for shard, inside in self.contents():
            found |= {one: Place(shard, row) for row, one in enumerate(inside) if one in wanted and one not in found}
        shards = sorted({place.shard for place in found.values()})
        with ThreadPoolExecutor(max_workers=threads) as pool:
            whole = dict(zip(shards, pool.map(self.whole, shards), strict=True))
        for shard in (shard for shard in shards if not whole[shard]):
            logger.warning("%s: damaged. What it held is computed again", self.file(shard))
            self._note_file(shard).unlink(missing_ok=True)
        return {one: place for one, place in found.items() if whole[place.shard]}

    def add(self, maps: Mapping[str, Tensor], image_ids: Sequence[str], note: str) -> str:
        """Keep the features of some images, in the bytes of a partition with `note`; returns the shard."""
        draft = self._draft()
        try:
            save_tensors(draft, maps, metadata={"wtflow": note})
            shard = sha256_file(draft)
            draft.replace(self.file(shard))
        finally:
            draft.unlink(missing_ok=True)
        self._write_note(shard, image_ids)
        return shard

    def adopt(self, features: FeatureShards, wanted: Collection[str]) -> set[str]:
        """Take over the partitions of a sealed folder that hold one of `wanted`, if their bytes are those that were
        sealed; returns those of `wanted` that came with them. Features of another backbone are left."""
        if features.header["backbone_digest"] != self.backbone_digest:
            return set()
        lacking = set(wanted)
        partitions: dict[int, list[str]] = {}
        for row in features.index.select(["partition", "image_id"]).to_pylist():
            partitions.setdefault(row["partition"], []).append(row["image_id"])
        for number, image_ids in partitions.items():
            name = part_name(number)
            shard, source = features.header["files"][name], features.folder / name
            if lacking.isdisjoint(image_ids) or not source.is_file() or sha256_file(source) != shard:
                continue
            draft = self._draft()
            try:
                link(source, draft)
                draft.replace(self.file(shard))
            finally:
                draft.unlink(missing_ok=True)
            self._write_note(shard, image_ids)
            lacking.difference_update(image_ids)
        return set(wanted) - lacking

    def note(self, shard: str) -> str:
        """What was noted in a shard when it was written."""
        with safe_open(self.file(shard), framework="pt") as file:
            note: str = file.metadata()["wtflow"]
        return note

    def rows(self, shard: str) -> int:
        """Images of a shard."""
        with safe_open(self.file(shard), framework="pt") as file:
            return int(file.get_slice(next(iter(file.keys()))).get_shape()[0])

    def reader(self) -> Callable[[Sequence[Place]], dict[str, Tensor]]:
        """A function that gathers the features of some images, in their order, by level, as a partition names them. It
        keeps some shards open."""

        @lru_cache(maxsize=OPEN_SHARDS)
        def opened(shard: str) -> dict[str, Tensor]:
            with safe_open(self.file(shard), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

        def gather(places: Sequence[Place]) -> dict[str, Tensor]:
            rows = [(opened(place.shard), place.row) for place in places]
            names = rows[0][0] if rows else ()
            return {name: torch.stack([shard[name][row] for shard, row in rows]) for name in names}

        return gather

    def remove(self, shard: str) -> None:
        """Note first: a shard without one is not found. To be called while the cache is held alone."""
        self._note_file(shard).unlink(missing_ok=True)
        self.file(shard).unlink(missing_ok=True)

    def whole(self, shard: str) -> bool:
        """Whether the bytes are those that were written."""
        path = self.file(shard)
        return path.is_file() and sha256_file(path) == shard

    def notes(self) -> list[Path]:
        """Of the shards, whatever is in them."""
        return sorted(path for path in self.folder.glob("*.json") if path.name != "backbone.json")

    def _write_note(self, shard: str, image_ids: Sequence[str]) -> None:
        text = {"images": list(image_ids), "digest": digest_of([shard, list(image_ids)])}
        with replacing(self._note_file(shard)) as draft:
            draft.write_text(json.dumps(text) + "\n", encoding="utf-8")

    def _note_file(self, shard: str) -> Path:
        return self.folder / f"{shard}.json"

    def _draft(self) -> Path:
        return self.folder / f"shard.tmp-{uuid.uuid4().hex[:8]}"


def fill(shelf: Shelf, features: Path, wanted: Collection[str] | None = None) -> int:
    """Take over what the folders of a folder like data/features hold of `wanted`, or at all, and the shelf lacks;
    returns how many images. What does not open, or is of another backbone, is passed over."""
    present = {image_id for _, image_ids in shelf.contents() for image_id in image_ids}
    before = len(present)
    for path in sorted(features.glob("*/*/index.json")):
        if wanted is not None and present.issuperset(wanted):
            break
        try:
            opened = FeatureShards.open(path.parent, verify=False)
        except (WTFlowError, OSError, ValueError) as error:
            logger.warning("%s: not taken over (%s)", path.parent, error)
            continue
        inside = set(opened.index["image_id"].to_pylist())
        present |= shelf.adopt(opened, (inside if wanted is None else inside.intersection(wanted)) - present)
    return len(present) - before


def noted(path: Path) -> list[str] | None:
    """The image_ids of a shard's note; None if they are not those that were written."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        image_ids: list[str] = values["images"]
        return image_ids if values["digest"] == digest_of([path.stem, image_ids]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _locked(lock: int, how: int) -> bool:
    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        return False
    return True
