"""How many training images a line needs: WT-Flow beside nearest neighbours on the same features, from 20 images up.

Three random draws of each size, with the draw's number as the seed of both. The calibration split is left as it is,
and all settings are those of params.yaml. `make repro` brings the features. What was measured is kept in
.wtflow/bench/small_lines.
"""

import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from benchmarks import neighbours
from benchmarks.contest.methods import preset
from benchmarks.contest.trial import key
from benchmarks.product_lines import PLACE, ProductLine, extract_features, product_lines
from benchmarks.report import Claim, at_least, parse_no_arguments, publish
from pipelines.validation import Sample
from wtflow.artefact import read_json, write_json
from wtflow.data.shards import FeatureShards
from wtflow.scoring.metrics import auroc
from wtflow.training import be_deterministic, finish, start, train

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


def subset(shards: FeatureShards, size: int | None, draw: int) -> FeatureShards:
    """The same features with `size` random training images left; everything else stays."""
    rows = shards.rows(split="train")
    if size is None or size >= len(rows):
        return shards
    dropped = set(np.random.default_rng(draw).permutation(rows)[size:].tolist())
    return replace(shards, index=shards.index.take(pa.array([row for row in range(len(shards)) if row not in dropped])))


def _row(line: ProductLine, size: int | None) -> dict[str, Any]:
    found = [_measured(line, size, draw) for draw in DRAWS]
    row: dict[str, Any] = {"line": line.name, "size": size or "all", "images": found[0]["images"]}
    for name in ("wtflow", "neighbours"):
        values = [one[name] for one in found]
        row |= {name: statistics.mean(values), f"{name}_sd": statistics.stdev(values)}
    return row


def _measured(line: ProductLine, size: int | None, draw: int) -> dict[str, Any]:
    method = preset("default", {}, line)
    both = replace(method, code=[*method.code, "benchmarks/neighbours.py"])
    path = KEPT / f"{line.name}-{size or 'all'}-{draw}-{key(both, line, draw)[:12]}.json"
    if not path.exists():
        params = line.train_params.model_copy(update={"seed": draw})
        shards, test = subset(line.shards("fit"), size, draw), line.shards("test")
        be_deterministic()
        state = start(shards, params)
        train(state, shards, params)
        finish(state, shards)
        rows, fusion = shards.rows(split="train"), state.scorer.fusion
        ours, theirs = [], []
        for label in ("normal", "anomalous"):
            scored = test.rows(label=label)
            ours.append(Sample(test, scored).scores(state.scorer))
            theirs.append(neighbours.scores(fusion, shards, rows, test, scored, seed=draw))
        write_json(path, {"images": len(rows), "wtflow": auroc(*ours), "neighbours": auroc(*theirs)})
        Console().print(f"{line.name}, {size or 'all'} images, draw {draw}: {read_json(path)}", highlight=False)
    found: dict[str, Any] = read_json(path)
    return found


if __name__ == "__main__":
    main()
