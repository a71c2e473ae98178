"""What is in a feature cache, whether it is whole, and what of it nothing uses any more."""

import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wtflow.artefact import read_json
from wtflow.data.manifest import Manifest
from wtflow.data.shards import FORMAT
from wtflow.errors import WTFlowError
from wtflow.features.augment import source_of
from wtflow.features.cache import FeatureCache, Shelf, fill, noted

KEPT_SHARE = 0.5
"""A shard of which less is in use is written anew without the rest."""


@dataclass(frozen=True)
class Holding:
    """A shelf, counted."""

    backbone: str
    """Name of the network."""
    digest: str
    image_size: list[int]
    levels: list[int]
    format: int
    shards: int
    images: int
    bytes: int
    linked_bytes: int
    """Of these, those that another name on the same file system holds too, as data/features does."""


@dataclass(frozen=True)
class Fault:
    """A file of the cache that is not what it should be."""

    path: Path
    what: str


@dataclass(frozen=True)
class Waste:
    """A shard with images that nothing uses."""

    shelf: Shelf
    shard: str
    used: list[str]
    """Its images that are used: none, or so few that they are moved to another shard."""
    images: int

    @property
    def bytes(self) -> int:
        """That its file occupies alone."""
        try:
            status = self.shelf.file(self.shard).stat()
        except FileNotFoundError:
            return 0
        return status.st_size if status.st_nlink == 1 else 0


def holdings(cache: FeatureCache) -> list[Holding]:
    """Every shelf, counted; reads no shard."""
    return [_holding(shelf) for shelf in cache.shelves()]


def _holding(shelf: Shelf) -> Holding:
    shards, images, settings = 0, set[str](), _settings(shelf)
    for _, image_ids in shelf.contents():
        shards += 1
        images |= set(image_ids)
    found = [path.stat() for path in shelf.folder.iterdir() if path.is_file()]
    return Holding(
        backbone=settings["name"],
        digest=shelf.backbone_digest,
        image_size=settings["image_size"],
        levels=settings["levels"],
        format=int(shelf.folder.name.partition("-")[0]),
        shards=shards,
        images=len(images),
        bytes=sum(status.st_size for status in found),
        linked_bytes=sum(status.st_size for status in found if status.st_nlink > 1),
    )


def _settings(shelf: Shelf) -> dict[str, Any]:
    settings = shelf.backbone
    if not _of_backbone(settings):
        raise WTFlowError(
            f"{shelf.folder / 'backbone.json'}: not the settings of a backbone. Remove this file: the next extraction, "
            "or wtflow cache fill, writes it again."
        )
    return settings


def _of_backbone(settings: Any) -> bool:
    """Whether a value from a file has what is shown of a backbone."""
    kinds = {"name": str, "image_size": list, "levels": list}
    return isinstance(settings, dict) and all(isinstance(settings.get(key), kind) for key, kind in kinds.items())


def faults(shelf: Shelf) -> Iterator[Fault]:
    """Every file that is not what it should be; reads them all."""
    for path in shelf.notes():
        if noted(path) is None:
            yield Fault(path, "not the note that was written")
        if not shelf.file(path.stem).is_file():
            yield Fault(path, "its shard is missing")
    for path in _shards(shelf):
        note = path.with_suffix(".json")
        image_ids = noted(note)
        if not shelf.whole(path.stem):
            yield Fault(path, "not the bytes that were written")
        elif not note.is_file():
            yield Fault(path, "its note is missing")
        elif image_ids is not None and shelf.rows(path.stem) != len(image_ids):
            yield Fault(path, "has another number of images than its note")


def images_in_use(prepared: Iterable[Path]) -> set[str]:
    """Every image of every manifest below some folders like data/prepared. Raises if one holds none: then all would
    count as unused."""
    used: set[str] = set()
    for folder in prepared:
        manifests = sorted(folder.glob("*/manifest.parquet"))
        if not manifests:
            raise WTFlowError(
                f"{folder}: no <line>/manifest.parquet, so its images would count as unused. Run where data/prepared "
                "is, or name the folder (--prepared). To be rid of the whole cache, remove its folder."
            )
        for path in manifests:
            used.update(Manifest.read(path).table["image_id"].to_pylist())
    return used


def waste(shelf: Shelf, used: Collection[str]) -> list[Waste]:
    """Shards of which nothing, or less than `KEPT_SHARE`, is used. An image of two shards counts in the first; a copy
    is used while its photograph is."""
    seen, found = set[str](), []
    for shard, image_ids in shelf.contents():
        needed = [image_id for image_id in image_ids if source_of(image_id) in used and image_id not in seen]
        seen.update(needed)
        if len(needed) < KEPT_SHARE * len(image_ids):
            found.append(Waste(shelf, shard, needed, len(image_ids)))
    return found


def remove_waste(shelf: Shelf, found: Collection[Waste]) -> None:
    """Remove these shards, moving what is used of them to new ones. To be called while the cache is held alone; also
    removes shards without a note, which a killed run left."""
    size = max((one.images for one in found), default=1)
    places = shelf.find({image_id for one in found for image_id in one.used})
    wanted, gather = sorted(places), shelf.reader()
    made = set()
    for start in range(0, len(wanted), size):
        image_ids = wanted[start : start + size]
        made.add(shelf.add(gather([places[image_id] for image_id in image_ids]), image_ids, "moved"))
    for one in found:
        if one.shard not in made:
            shelf.remove(one.shard)
    for path in _shards(shelf):
        if not path.with_suffix(".json").is_file():
            path.unlink()


def shelves_of(cache: FeatureCache, prefix: str) -> list[Shelf]:
    """Those of a backbone, by the first digits of its digest. Raises if there is none, or several backbones."""
    if not prefix:  # every digest begins with it
        raise WTFlowError("--drop: no digest given. Name a backbone by the first digits that `wtflow cache ls` shows.")
    found = [shelf for shelf in cache.shelves() if shelf.backbone_digest.startswith(prefix)]
    if len({shelf.backbone_digest for shelf in found}) != 1:
        known = ", ".join(sorted(shelf.backbone_digest[:12] for shelf in cache.shelves())) or "none"
        raise WTFlowError(
            f"{cache.folder}: {prefix!r} is the beginning of {len(found)} backbone digests, not of one. Known: {known}."
        )
    return found


def remove_shelf(shelf: Shelf) -> None:
    """All features of a backbone. To be called while the cache is held alone."""
    shutil.rmtree(shelf.folder)


def fill_from(cache: FeatureCache, features: Path) -> int:
    """Take over everything that folders below one like data/features hold and the cache lacks, such as what `dvc pull`
    brought, if its bytes are those that were sealed; returns how many images."""
    shelves: dict[str, dict[str, Any]] = {}
    for path in sorted(features.glob("*/*/index.json")):
        header = read_json(path)
        if isinstance(header, dict) and header.get("format") != FORMAT:
            continue
        if not isinstance(header, dict) or not _of_backbone(header.get("backbone")):
            raise WTFlowError(f"{path}: not the header of features. Fetch the features again.")
        digest = str(header.get("backbone_digest"))
        if not re.fullmatch("[0-9a-f]{64}", digest):  # it becomes the name of a folder
            raise WTFlowError(f"{path}: backbone_digest {digest!r} is not 64 hex digits. Fetch the features again.")
        shelves[digest] = header["backbone"]
    return sum(fill(cache.shelf_of(digest, settings), features) for digest, settings in shelves.items())


def _shards(shelf: Shelf) -> list[Path]:
    return sorted(shelf.folder.glob("*.safetensors"))
