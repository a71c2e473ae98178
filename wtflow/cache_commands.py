"""`wtflow cache`: what is in the feature cache, whether it is whole, and how it is made smaller."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from wtflow.errors import WTFlowError
from wtflow.tables import console

if TYPE_CHECKING:
    from wtflow.features.cache import FeatureCache

MIB = 2**20

cache = typer.Typer(
    help="The features that were computed once: list, check, clean, fill. Where they are: --cache, else "
    "WTFLOW_FEATURES, else features/ in WTFLOW_WORK (.wtflow).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
CacheOption = Annotated[
    Path | None, typer.Option("--cache", metavar="FOLDER", envvar="WTFLOW_FEATURES", help="Folder of the cache.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs: JSON instead of a table.")]


@cache.command(name="ls", epilog="\b\nexample:\n  wtflow cache ls --json | jq .[].images")
def list_holdings(folder: CacheOption = None, as_json: JsonOption = False) -> None:
    """Backbones, their images and their size. Linked: shared with another name of the same bytes, as data/features."""
    from wtflow.features import upkeep

    found = upkeep.holdings(_cache(folder))
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
        return
    table = Table(caption=f"{sum(one.bytes for one in found) / MIB:.1f} MiB in all")
    for column in ("backbone", "digest", "image size", "levels"):
        table.add_column(column)
    for column in ("shards", "images", "MiB", "linked MiB"):
        table.add_column(column, justify="right")
    for one in found:
        size, levels = " x ".join(map(str, one.image_size)), ", ".join(map(str, one.levels))
        sizes = (f"{one.bytes / MIB:.1f}", f"{one.linked_bytes / MIB:.1f}")
        table.add_row(one.backbone, one.digest[:12], size, levels, str(one.shards), str(one.images), *sizes)
    console().print(table)


@cache.command()
def verify(
    folder: CacheOption = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the damaged files.")] = False,
) -> None:
    """Read every file and compare it with its digest. Status 1 if one is damaged."""
    from wtflow.features import upkeep
    from wtflow.features.cache import Shelf

    place = _cache(folder)
    with place.alone() if remove else place.held():
        found = [fault for shelf in place.shelves() for fault in upkeep.faults(shelf)]
        for fault in found:
            typer.echo(f"{fault.path}: {fault.what}")
            if remove:
                Shelf(fault.path.parent).remove(fault.path.stem)
    images = sum(one.images for one in upkeep.holdings(place))
    if found and remove:
        typer.echo(f"{len(found)} damaged files removed, {images} images left: what is missing is computed when needed")
    elif found:
        raise WTFlowError(
            f"{place.folder}: {len(found)} damaged files. Type: wtflow cache verify --remove. What they held is "
            "computed again when it is needed. If features were linked to them, also: dvc checkout --force"
        )
    else:
        typer.echo(f"{place.folder}: {images} images, all files whole")


@cache.command(
    epilog="\b\nexamples:\n"
    "  wtflow cache gc --dry-run\n"
    "  wtflow cache gc --prepared data/prepared --prepared ../other/data/prepared\n"
    "  wtflow cache gc --drop 8d079d26"
)
def gc(
    folder: CacheOption = None,
    prepared: Annotated[
        list[Path] | None,
        typer.Option(
            "--prepared",
            metavar="FOLDER",
            help="Folder of manifests, <line>/manifest.parquet; of a shared cache name all. Default: data/prepared.",
        ),
    ] = None,
    drop: Annotated[
        str | None, typer.Option("--drop", metavar="DIGEST", help="Remove all features of this backbone instead.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove what no manifest of data/prepared uses any more. Refused while a run uses the cache."""
    from wtflow.features import upkeep

    place = _cache(folder)
    with place.held() if dry_run else place.alone():
        if drop is not None:
            _drop(place, drop, dry_run)
            return
        used = upkeep.images_in_use(prepared or [Path("data/prepared")])
        images = freed = shards = 0
        for shelf in place.shelves():
            found = upkeep.waste(shelf, used)
            for one in found:
                images += one.images - len(one.used)
                freed += one.bytes
                shards += 1
                moved = f", {len(one.used)} used ones move" if one.used else ""
                typer.echo(f"{shelf.file(one.shard)}: {one.images} images{moved}")
            if not dry_run:
                upkeep.remove_waste(shelf, found)
    done = "would be removed" if dry_run else "removed"
    typer.echo(
        f"{place.folder}: {images} images in {shards} shards {done}, {freed / MIB:.1f} MiB that nothing links to"
    )


@cache.command(epilog="\b\nexample:\n  dvc pull && wtflow cache fill")
def fill(
    features: Annotated[Path, typer.Argument(help="Folder with <line>/<output>/.")] = Path("data/features"),
    folder: CacheOption = None,
) -> None:
    """Take over existing features, as `dvc pull` brings them. Their bytes are compared with their digests."""
    from wtflow.features import upkeep
    from wtflow.features.cache import FeatureCache

    place = FeatureCache(_folder(folder))
    if not any(features.glob("*/*/index.json")):
        raise WTFlowError(f"{features}: no <line>/<output>/index.json. Type: dvc pull")
    with place.held():
        count = upkeep.fill_from(place, features)
    typer.echo(f"{place.folder}: {count} images taken over from {features}")


def _drop(place: "FeatureCache", prefix: str, dry_run: bool) -> None:
    from wtflow.features import upkeep

    for shelf in upkeep.shelves_of(place, prefix):
        if not dry_run:
            upkeep.remove_shelf(shelf)
        typer.echo(f"{shelf.folder}: {'would be removed' if dry_run else 'removed'}")


def _folder(given: Path | None) -> Path:
    return given or Path(os.environ.get("WTFLOW_WORK") or ".wtflow") / "features"


def _cache(given: Path | None) -> "FeatureCache":
    from wtflow.features.cache import FeatureCache

    folder = _folder(given)
    if not folder.is_dir():
        raise WTFlowError(f"{folder}: no such folder. Nothing was extracted yet, or it is elsewhere: WTFLOW_FEATURES.")
    return FeatureCache(folder)
