"""How many training images a line needs: WT-Flow beside nearest neighbours on the same features, from 20 images up.

Three random draws of each size, with the draw's number as the seed of both. The calibration split is left as it is,
and all settings are those of params.yaml: a line as small as that trains on copies, which neighbours do not see.
`make repro` brings the features. What was measured is kept in .wtflow/bench/small_lines.
"""

import statistics
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import neighbours
from benchmarks.contest.methods import preset
from benchmarks.contest.trial import key
from benchmarks.product_lines import PLACE, ProductLine, extract_features, image_auroc, moved, product_lines, trained
from benchmarks.report import Claim, at_least, parse_no_arguments, publish
from pipelines.lines import read_params
from wtflow.artefact import read_json, write_json
from wtflow.batches import READ_AT_ONCE
from wtflow.data.manifest import Manifest
from wtflow.scoring.metrics import auroc
from wtflow.training import blank

SIZES = (20, 50, 100, None)
"""Training images; None: all of them."""
DRAWS = (0, 1, 2)
KEPT = PLACE / "small_lines"
TOLERANCE = 0.01


def main() -> None:
    """Measure what is missing and publish."""
    parse_no_arguments(__doc__ or "", "make bench NAME=small_lines")
    rows = []
    for line in product_lines():
        extract_features(line)
        rows += [_row(line, size) for size in SIZES]
    publish("small_lines", rows, claims(rows))


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """One a size: the line where WT-Flow is least ahead."""
    made = []
    for size in dict.fromkeys(row["size"] for row in rows):
        ahead = min(row["wtflow"] - row["neighbours"] for row in rows if row["size"] == size)
        made.append(
            at_least(f"{size} training images: image AUROC less nearest neighbours', worst line", ahead, -TOLERANCE)
        )
    return made


def reduced(line: ProductLine, size: int | None, draw: int) -> ProductLine:
    """The line with `size` random training images left, in a workplace of its own; everything else stays."""
    rows = line.manifest.rows()
    images = [row["image_id"] for row in rows if row["split"] == "train"]
    if size is None or size >= len(images):
        return line
    dropped = set(np.random.default_rng(draw).permutation(images)[size:].tolist())
    left = [row for row in rows if row["image_id"] not in dropped]
    manifest = Manifest.of_rows(left, line.name, line.manifest.data_version)
    place = PLACE / "small" / f"{line.name}-{size}-{draw}"
    return moved(line, place, read_params(line.place / "params.yaml"), manifest)


def _row(line: ProductLine, size: int | None) -> dict[str, Any]:
    found = [_measured(line, size, draw) for draw in DRAWS]
    counts = {name: found[0][name] for name in ("images", "copies")}
    row: dict[str, Any] = {"line": line.name, "size": size or "all", **counts}
    for name in ("wtflow", "neighbours"):
        values = [one[name] for one in found]
        row |= {name: statistics.mean(values), f"{name}_sd": statistics.stdev(values)}
    return row


def _measured(line: ProductLine, size: int | None, draw: int) -> dict[str, Any]:
    small = reduced(line, size, draw)
    method = preset("default", {}, small)
    augment = small.extract_params.augment.model_dump(mode="json")
    both = replace(
        method,
        settings={**method.settings, "augment": augment},
        code=[*method.code, "benchmarks/neighbours.py", "wtflow/features/augment.py"],
    )
    path = KEPT / f"{line.name}-{size or 'all'}-{draw}-{key(both, small, draw)[:12]}.json"
    if not path.exists():
        extract_features(small)
        shards, test = small.shards("fit"), small.shards("test")
        scorer = trained(shards, small.train_params.model_copy(update={"seed": draw}))
        rows = shards.rows(split="train")
        fusion = blank(shards, small.train_params).scorer.fusion
        fusion.learn_statistics(shards.batches(rows, READ_AT_ONCE))  # of the photographs alone
        theirs = [
            neighbours.scores(fusion, shards, rows, test, test.rows(label=label), seed=draw)
            for label in ("normal", "anomalous")
        ]
        figures = {
            "images": len(rows),
            "copies": len(shards.training_rows()) - len(rows),
            "wtflow": image_auroc(scorer, test),
            "neighbours": auroc(*theirs),
        }
        write_json(path, figures)
        Console().print(f"{line.name}, {size or 'all'} images, draw {draw}: {figures}", highlight=False)
    found: dict[str, Any] = read_json(path)
    return found


if __name__ == "__main__":
    main()
