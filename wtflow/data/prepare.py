"""Raw images -> manifest and rejected images. Nothing that was found is lost between the two.

layout --SourceImage--> scan (read once, SHA-256, decode what is new) --> copies out --> split by group --> manifest

What a person should know of images that are used all the same (`Finding`) is told beside them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from wtflow.data.likeness import near_duplicates
from wtflow.data.looks import Looks
from wtflow.data.manifest import (
    FINDINGS_SCHEMA,
    REJECTED_SCHEMA,
    Manifest,
    PrepareParams,
    Split,
    cut_from_train,
    split_of,
)
from wtflow.data.scan import Rejection, Scanned, scan, storable
from wtflow.data.sources.layouts import LAYOUTS, PASSED_OVER, STRAYS
from wtflow.data.sources.source_image import SourceImage
from wtflow.data.tree import files, is_image, linked_folders
from wtflow.data.version import data_version
from wtflow.errors import WTFlowError

KEPT_FIRST: tuple[Split | None, ...] = ("test", "calibrate", "train", None)
"""Of copies in several splits of the data set's own, which one stays."""
NO_MEANING = "an image file in a place that the layout gives no meaning"


@dataclass(frozen=True)
class Finding:
    """What is odd about an image that is used: `empty_mask`, `no_mask`, `copies_differ` or `near_duplicate`."""

    path: str
    finding: str
    detail: str


@dataclass(frozen=True)
class Prepared:
    """What the prepare stage leaves; `rejected` and `findings` have the columns of their schemas, sorted by path."""

    manifest: Manifest
    rejected: pa.Table
    findings: pa.Table


def prepare(
    raw: Path,
    line: str,
    params: PrepareParams,
    on_image: Callable[[int, int], None] = lambda done, total: None,
    looks: Path | None = None,
) -> Prepared:
    """Look at every image of `raw` and give each usable one its place.

    Splits go by group and by a stable hash: an image of new content never moves another one. Of several files
    with the same bytes and label the first by path stays, before others one whose mask marks something; with different
    labels none does. `on_image` hears (done, total) as it proceeds. The folder `looks` keeps what was seen of the
    photographs for the next time (`wtflow.data.looks`). Raises `WTFlowError` for a missing source, too many rejected
    images, or a split without normals.
    """
    if not raw.is_dir():
        raise WTFlowError(
            f"{raw}: no such folder. Bring the line's images (dvc repro fetch@{line}, or dvc pull), "
            f"or copy your own there and type: dvc add {raw}"
        )
    sources = sorted(LAYOUTS[params.layout](raw, params), key=lambda source: source.path)
    rejected = _not_in_layout(raw, sources, params)
    found = len(sources) + len(rejected)
    scanned: list[Scanned] = []
    seen = Looks(params.limits, looks)
    for done, outcome in enumerate(scan(raw, sources, params.limits, seen), start=1):
        if isinstance(outcome, Scanned):
            scanned.append(outcome)
        else:
            rejected.append(outcome)
        on_image(done, len(sources))
    seen.keep()
    version = data_version(raw, {path: md5 for image in scanned for path, md5 in image.md5s.items()})
    usable, set_aside, differing = _distinct(scanned)
    rejected += set_aside
    _check_rejected(raw, found, rejected, params)
    own = {source.split for source in sources if source.label == "normal"}
    rows = [_row(image, line, params, "calibrate" in own) for image in usable]
    _check_splits(raw, line, rows, own)
    findings = [*differing, *_mask_findings(usable), *_leaks(usable, [row["split"] for row in rows])]
    manifest = Manifest.of_rows(rows, line, version)
    return Prepared(manifest, _table(rejected, line, REJECTED_SCHEMA), _table(findings, line, FINDINGS_SCHEMA))


def _not_in_layout(raw: Path, sources: Iterable[SourceImage], params: PrepareParams) -> list[Rejection]:
    """Image files that the layout gives no meaning (misnamed folders, masks of no image), and linked folders."""
    named = {path for source in sources for path in (source.path, source.mask_path) if path}
    regions = {source.mask_path for source in sources if source.mask_path}
    passed_over, why = PASSED_OVER.get(params.layout), STRAYS.get(params.layout)
    strays = [
        Rejection(storable(path), "not_in_layout", storable((why and why(raw, path)) or NO_MEANING))
        for path in files(raw)
        if path not in named
        and is_image(path)
        and regions.isdisjoint(parent.as_posix() for parent in PurePosixPath(path).parents)
        and not (passed_over and passed_over.fullmatch(path))
    ]
    links = [
        Rejection(storable(path), "linked_folder", "neither DVC nor this stage follows it: copy its images here")
        for path in linked_folders(raw)
    ]
    return strays + links


def _distinct(scanned: Iterable[Scanned]) -> tuple[list[Scanned], list[Rejection], list[Finding]]:
    """Images of distinct bytes and no fault, the rest with the reason, and which copies say something else. Keeps the
    order."""
    copies: dict[str, list[Scanned]] = defaultdict(list)
    for image in scanned:
        copies[image.image_id].append(image)
    usable, rejected, differing = [], [], []
    for same in copies.values():
        if len({image.source.label for image in same}) > 1:
            detail = "same bytes, other label: " + ", ".join(f"{i.source.path} {i.source.label}" for i in same)
            rejected += [Rejection(image.source.path, "contradictory", detail) for image in same]
            continue
        rejected += [image.fault for image in same if image.fault]
        sound = sorted((image for image in same if not image.fault), key=_rank)
        usable += sound[:1]
        rejected += [_copy(image.source, sound[0].source) for image in sound[1:]]
        if len({(image.source.defect, _mask_md5s(image)) for image in sound}) > 1:
            differing.append(_copies_differ(*sound))
    return usable, rejected, differing


def _rank(image: Scanned) -> tuple[int, bool]:
    """Of copies the lowest stays."""
    return KEPT_FIRST.index(image.source.split), not image.marked


def _mask_md5s(image: Scanned) -> tuple[str, ...]:
    return tuple(md5 for path, md5 in image.md5s.items() if path != image.source.path)


def _copies_differ(kept: Scanned, *others: Scanned) -> Finding:
    """`kept` names one defect or mask, copies of it name others."""
    used, *left_out = (
        f"{one.path} ({one.defect}, {f'mask {one.mask_path}' if one.mask_path else 'no mask'})"
        for one in (image.source for image in (kept, *others))
    )
    return Finding(
        kept.source.path,
        "copies_differ",
        f"used: {used}; left out, with the same bytes: {', '.join(left_out)}. What only their masks mark counts as "
        "good: draw it into the mask that is used, or remove the copies that are wrong",
    )


def _copy(source: SourceImage, kept: SourceImage) -> Rejection:
    leak = "" if source.split == kept.split else f", which is in {kept.split}: it may not be in {source.split} too"
    return Rejection(source.path, "duplicate", f"of {kept.path}{leak}")


def _row(image: Scanned, line: str, params: PrepareParams, own_calibrate: bool) -> dict[str, Any]:
    """`own_calibrate`: the data set says itself which images calibrate."""
    source = image.source
    split: Split = "test"
    if source.label == "normal" and source.split is None:
        split = split_of(source.group, params)
    elif source.label == "normal" and source.split == "train" and not own_calibrate:
        split = cut_from_train(source.group, params)
    elif source.label == "normal" and source.split:
        split = source.split
    return {
        "image_id": image.image_id,
        "path": source.path,
        "line": line,
        "group": source.group,
        "split": split,
        "label": source.label,
        "defect": source.defect,
        "mask_path": source.mask_path,
        "width": image.width,
        "height": image.height,
    }


def _check_rejected(raw: Path, found: int, rejected: Sequence[Rejection], params: PrepareParams) -> None:
    if not found:
        raise WTFlowError(f"{raw}: layout {params.layout} finds no image there. Add images, or name another layout.")
    if len(rejected) <= params.max_rejected_fraction * found:
        return
    counts = Counter(rejection.reason for rejection in rejected)
    examples = [f"  {one.path}: {one.reason}: {one.detail}" for one in rejected[:5]]
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    raise WTFlowError(
        "\n".join(
            [
                f"{raw}: {len(rejected)} of {found} images rejected ({reasons}); "
                f"prepare.max_rejected_fraction is {params.max_rejected_fraction}. "
                "Mend or remove them, or raise it. The first:",
                *examples,
            ]
        )
    )


def _check_splits(raw: Path, line: str, rows: Sequence[Mapping[str, Any]], own: Collection[Split | None]) -> None:
    """Every split needs normals, and no group's normals may be in two. `own`: where the data set puts its normals; None
    where it leaves that to the hash."""
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["label"] == "normal":
            splits[row["group"]].add(row["split"])
    torn = sorted(group for group, found in splits.items() if len(found) > 1)
    if torn:
        raise WTFlowError(
            f"{raw}: normals of group {torn[0]!r} are in {' and '.join(sorted(splits[torn[0]]))} "
            f"({len(torn)} such groups). Move each group to one side, or narrow "
            f"lines.{line}.prepare.group_pattern."
        )
    empty = [split for split in ("train", "calibrate", "test") if {split} not in splits.values()]
    if empty:
        raise WTFlowError(
            f"{raw}: no normal image falls to {' and '.join(empty)}; normals form {len(splits)} groups. "
            + _filling(empty, own)
        )


def _filling(empty: Sequence[str], own: Collection[Split | None]) -> str:
    """How splits without normals get some."""
    if not own or None in own:
        return "Add images, make groups smaller, or change test_fraction, calibrate_fraction or salt."
    theirs = [split for split in empty if split == "test" or "calibrate" in own]
    if theirs:
        return f"The data set has its own split: add normal images to its own {' and '.join(theirs)}."
    return "Add images to the data set's own train, make groups smaller, or change calibrate_fraction or salt."


def _mask_findings(usable: Sequence[Scanned]) -> list[Finding]:
    """Anomalous images of which nobody says where: their mask marks nothing, or they have none though others do."""
    anomalous = [image for image in usable if image.source.label == "anomalous"]
    masked = any(image.source.mask_path for image in anomalous)
    empty = [
        Finding(i.source.path, "empty_mask", f"{i.source.mask_path} marks nothing: no pixel figure knows the image")
        for i in anomalous
        if i.source.mask_path and not i.marked
    ]
    missing = [
        Finding(i.source.path, "no_mask", "others of the line have one: no pixel figure knows the image")
        for i in anomalous
        if masked and not i.source.mask_path
    ]
    return empty + missing


def _leaks(usable: Sequence[Scanned], splits: Sequence[str]) -> list[Finding]:
    """Images of calibrate or test that are nearly one of the splits before."""
    return [
        Finding(
            usable[pair.image].source.path,
            "near_duplicate",
            f"in {splits[pair.image]}, nearly {usable[pair.other].source.path} in {splits[pair.other]} "
            f"(likeness {pair.likeness:.4f}): if they show one part, give them one group. Only photographs that are "
            "nearly identical are noticed; several exposures or angles of a part are not: prepare.group_pattern",
        )
        for pair in near_duplicates([image.thumbnail_YX for image in usable], splits)
    ]


def _table(rows: Iterable[Rejection | Finding], line: str, schema: pa.Schema) -> pa.Table:
    ordered = sorted(rows, key=lambda one: one.path)
    return pa.Table.from_pylist([{"line": line, **asdict(row)} for row in ordered], schema=schema)
