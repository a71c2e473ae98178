"""Training of solar-mono: two workers of Ray Train against one, the share of data loading; every line: features cached
or not, and once of a backbone as large as the paper's.

Every worker has one thread, whatever their number; repetitions take turns, so that what else the machine does falls on
all alike. Times are the clock's. `make repro` brings images and features.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks.presets import at_hand
from benchmarks.product_lines import PLACE, ProductLine, image_auroc, moved, product_lines
from benchmarks.report import Claim, at_least, at_most, parse_no_arguments, publish
from pipelines.adapters import ray_train
from pipelines.adapters.ray_runtime import cluster
from pipelines.environment import RunSettings
from pipelines.lines import read_params
from wtflow import training
from wtflow.artefact import digest_of, sha256_bytes
from wtflow.batches import Batches, build_batches
from wtflow.data.shards import FeatureShards
from wtflow.features.backbone import build_backbone
from wtflow.features.cache import FeatureCache
from wtflow.features.extract import Job, extract
from wtflow.params import merged
from wtflow.training import TrainingState, TrainParams, ahead, be_deterministic, finish, start, train

LINE = "solar-mono"
WORKERS = (1, 2)
REPEATS = 3
PIECE = 4
"""Epochs of a piece of the cached training: it fills its pool once, as the whole training does."""
LARGE = "wide_resnet50_2"
LOSS, AUROC = 0.005, 0.003
"""What may lie between one worker and two. Both see the same samples, times and noise, but add the gradient up in
another order: a difference of rounding that thousands of steps enlarge. Another seed changes image AUROC by a standard
deviation of 0.002 (docs/log.md): allowed is one and a half of these, and half a per cent of the loss."""


def main() -> None:
    """Measure everything and publish."""
    parse_no_arguments(__doc__ or "", "make bench NAME=train")
    torch.set_num_threads(1)
    lines = product_lines()
    line = next(line for line in lines if line.name == LINE)
    rows = [_summary(rows) for rows in _distributed(line).values()]
    rows += [_loading(line), *map(_cached, lines), _cached(_behind_a_large_backbone(line), 1)]
    publish("train", rows, claims(rows))


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """What the rows come to."""
    one, two, loading, *cached = rows
    return [
        at_most("2 workers against 1: final loss differs by, relative", abs(two["loss"] / one["loss"] - 1), LOSS),
        at_most("2 workers against 1: image AUROC differs by", abs(two["image_auroc"] - one["image_auroc"]), AUROC),
        at_most(
            "repetitions whose weights differ from the first, with 1 and with 2 workers",
            one["different_weights"] + two["different_weights"],
            0,
        ),
        at_least("2 workers against 1, a thread each: times faster an epoch", one["epoch_s"] / two["epoch_s"], 1.5),
        at_most("share of a training's time in loading data", loading["loading_share"], 0.05),
        *(
            at_least(
                f"{row['line']}, features of {row['backbone']} from the cache: times faster an epoch",
                row["times_faster"],
                10,
            )
            for row in cached
        ),
    ]


def _distributed(line: ProductLine) -> dict[int, list[dict[str, Any]]]:
    """A row a training, by the number of workers."""
    rows: dict[int, list[dict[str, Any]]] = {workers: [] for workers in WORKERS}
    test = line.shards("test")
    with cluster(max(WORKERS)):
        for repeat in range(REPEATS):
            for workers in WORKERS:
                rows[workers].append(_trained(line, test, workers, f"bench-{workers}-{repeat}"))
                Console().print(str(rows[workers][-1]), highlight=False)
    return rows


def _trained(line: ProductLine, test: FeatureShards, workers: int, name: str) -> dict[str, Any]:
    settings = RunSettings(work=PLACE / "train", storage="", threads=workers, num_workers=workers)
    heard: list[float] = []
    state = ray_train.fit(name, line.features("fit"), line.train_params, settings, lambda epoch: heard.append(_clock()))
    ray_train.forget(name, settings)
    return {
        "workers": workers,
        "epoch_s": statistics.median(after - before for before, after in pairwise(heard)),
        "loss": state.history[-1].loss,
        "image_auroc": image_auroc(finish(state, line.shards("fit")), test),
        "weights": _weights(state),
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    return {
        "what": f"Ray Train, {first['workers']} workers of a thread, {len(rows)} trainings",
        "epoch_s": min(row["epoch_s"] for row in rows),
        "epochs_s": [row["epoch_s"] for row in rows],
        "loss": first["loss"],
        "image_auroc": first["image_auroc"],
        "different_weights": sum(row["weights"] != first["weights"] for row in rows),
    }


def _loading(line: ProductLine) -> dict[str, Any]:
    """A whole training in this process, with a second core at hand. Loading: the pool is filled, and every step waits
    for its samples, which a thread draws during the step before."""
    shards, params = line.shards("fit"), line.train_params
    be_deterministic()
    began = _clock()
    state = start(shards, params)
    with _timed() as spent:
        train(state, shards, params)
    seconds = _clock() - began
    return {
        "what": "plain loop, 1 thread and the one that draws",
        "seconds": seconds,
        "epoch_s": seconds / params.epochs,
        "filling_s": spent["fill"],
        "waiting_s": spent["draw"],
        "loading_share": sum(spent.values()) / seconds,
    }


def _cached(line: ProductLine, repeats: int = REPEATS) -> dict[str, Any]:
    """Epochs on the cached features (the pool filled once in `PIECE`), and an epoch that first sends every training
    image through the backbone. An epoch has as many steps however many images there are, so the more images, and the
    larger the backbone, the more the cache saves."""
    params = line.train_params
    cached: list[float] = []
    anew: list[float] = []
    extracting: list[float] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=PLACE) as folder:
            began = _clock()
            _extract(line, Path(folder))
            extracting.append(_clock() - began)
            features = Path(folder) / "features"
            state, began = start(FeatureShards.open(features), params), _clock()
            _epochs(state, FeatureShards.open(features), params, 1)
            anew.append(extracting[-1] + _clock() - began)
            began = _clock()
            _epochs(state, FeatureShards.open(features), params, PIECE)
            cached.append((_clock() - began) / PIECE)
    return {
        "what": "epoch on cached features, and anew",
        "line": line.name,
        "backbone": line.extract_params.backbone.name,
        "images": len(line.manifest.rows("train")),
        "epoch_s": statistics.median(cached),
        "anew_s": statistics.median(anew),
        "extracting_s": statistics.median(extracting),
        "times_faster": statistics.median(anew) / statistics.median(cached),
    }


def _behind_a_large_backbone(line: ProductLine) -> ProductLine:
    """The line behind the paper's backbone. Its weights are random, which times do not notice."""
    params = read_params(line.place / "params.yaml")
    place = PLACE / "large"
    place.mkdir(parents=True, exist_ok=True)
    backbone = at_hand(line.extract_params.backbone.model_copy(update={"name": LARGE, "weights": "hub"}), place)
    changed = merged(params, {"extract": {"backbone": backbone.model_dump(mode="json")}})
    return moved(line, place, changed, line.manifest)


def _extract(line: ProductLine, folder: Path) -> None:
    params, rows = line.extract_params, line.manifest.rows("train")
    facts = {
        "line": line.name,
        "data_version": line.manifest.data_version,
        "manifest_digest": line.manifest.digest,
        "backbone": params.backbone.model_dump(mode="json"),
    }
    empty = FeatureCache(folder / "cache")
    job = Job(line.raw, empty, build_backbone(params.backbone), params, line.prepare_params.limits)
    extract(rows, folder / "features", job, facts)


def _epochs(state: TrainingState, shards: FeatureShards, params: TrainParams, count: int) -> None:
    """The next epochs of a training."""
    train(state, shards, params.model_copy(update={"epochs": len(state.history) + count}))


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Seconds that the loop of trainings within waited for batches: until the pool was full, and for every sample."""
    spent = {"fill": 0.0, "draw": 0.0}

    def filled(*arguments: Any) -> Batches:
        began = _clock()
        batches = build_batches(*arguments)
        spent["fill"] += _clock() - began
        return batches

    def waited(items: Iterator[Any]) -> Iterator[Any]:
        coming = ahead(items)
        while True:
            began = _clock()
            item = next(coming, None)
            spent["draw"] += _clock() - began
            if item is None:
                return
            yield item

    with patch.object(training, "build_batches", filled), patch.object(training, "ahead", waited):
        yield spent


def _weights(state: TrainingState) -> str:
    return digest_of({name: sha256_bytes(value.numpy().tobytes()) for name, value in state.scorer.state_dict().items()})


_clock = time.perf_counter

if __name__ == "__main__":
    main()
