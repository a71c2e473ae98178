"""The main job, measured: image AUROC by seed beside nearest neighbours, group split against random split, stage times.

`dvc repro` brings the default lines up to date; the seeds train on its cached features. The third line, magnetic-tile,
comes in when WTFLOW_SHARED_DATA names the folder of its images, in a workplace of its own under .wtflow/bench.
"""

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from benchmarks import neighbours
from benchmarks.product_lines import PROJECT, extract_features, product_lines
from benchmarks.report import Claim, at_least, at_most, parse_no_arguments, publish
from pipelines.environment import RunSettings, timings_file
from pipelines.lines import line_params
from pipelines.validation import Sample
from wtflow.artefact import read_json
from wtflow.bundle import load_bundle
from wtflow.data.shards import REJECTED, FeatureShards, part_name, seal
from wtflow.scoring.calibration import Calibration, calibrate
from wtflow.scoring.metrics import auroc
from wtflow.training import TrainingState, TrainParams, be_deterministic, finish, start, train

SEEDS = (0, 1, 2)
FIGURES = ("image_auroc", "fpr", "tpr")
LIMITS = {"solar-mono": 0.92, "solar-poly": 0.90}
STAGES = ("fetch", "prepare", "extract", "train", "evaluate", "register")
THREADS = len(os.sched_getaffinity(0))


def main() -> None:
    """Measure line after line, then publish: claims about the worst line are of all lines."""
    parse_no_arguments(__doc__ or "", "make bench NAME=main_job")
    torch.set_num_threads(THREADS)
    subprocess.run(["dvc", "repro"], cwd=PROJECT, check=True)
    rows: list[dict[str, Any]] = []
    for line in product_lines():
        extract_features(line)
        rows += _line_rows(line.name, line.place)
    publish("main_job", rows, _claims(rows))


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    found = {(row["line"], row["what"]): row for row in rows}
    claims = []
    for line in dict.fromkeys(row["line"] for row in rows):
        mean = found[line, "mean"]["image_auroc"]
        if line in LIMITS:
            claims.append(at_least(f"{line}: mean image AUROC over seeds 0, 1, 2", mean, LIMITS[line]))
        ahead = mean - found[line, "nearest neighbours"]["image_auroc"]
        claims.append(at_least(f"{line}: ahead of nearest neighbours on the same features and split", ahead, 0))
    stages = [found.get((line, f"stage {stage}")) for line in LIMITS for stage in STAGES]
    whole = [row for row in stages if row is not None and not row.get("cached")]
    if len(whole) == len(stages):  # else some stage did not run, or not in full
        minutes = sum(row["seconds"] for row in whole) / 60
        claims.append(at_most("minutes of all stages of the default lines, one after the other", minutes, 15))
    return claims


def _line_rows(line: str, place: Path) -> list[dict[str, Any]]:
    """Stages as they ran last, seeds, nearest neighbours, random split, latency."""
    settings = line_params(line, "train", TrainParams, place / "params.yaml")
    fit, test = (FeatureShards.open(place / f"data/features/{line}/{name}") for name in ("fit", "test"))
    seeds: list[dict[str, Any]] = []
    if place == PROJECT:
        stage = read_json(place / f"metrics/{line}.json")
        seeds.append({"line": line, "what": f"seed {stage['seed']}", **{key: stage[key] for key in FIGURES}})
    for seed in SEEDS[len(seeds) :]:
        values = settings.model_copy(update={"seed": seed})
        state = _trained(fit, values)
        seeds.append({"line": line, "what": f"seed {seed}", **_figures(state, values, fit, test)})
    mean = {key: statistics.mean(row[key] for row in seeds) for key in FIGURES}
    spread = statistics.stdev(row["image_auroc"] for row in seeds)
    rows = [*_stage_rows(line, place), *seeds, {"line": line, "what": "mean", **mean, "sd": spread}]
    rows.append({"line": line, "what": "nearest neighbours", "image_auroc": _neighbours(state, fit, test)})
    if place == PROJECT:
        rows.append(_random_split(line, settings))
    return [*rows, *_latency(line)] if place == PROJECT else rows


def _stage_rows(line: str, place: Path) -> list[dict[str, Any]]:
    """What the stages noted when they ran last; of `extract` also how many images came from the feature cache."""
    rows: list[dict[str, Any]] = []
    if place != PROJECT:  # no stage runs there
        return rows
    for stage in STAGES:
        path = PROJECT / timings_file(RunSettings(), stage, line)
        if path.exists():
            rows.append({"line": line, "what": f"stage {stage}", **json.loads(path.read_text())})
        if path.exists() and stage == "extract":
            parts = [json.loads(path.with_name(f"extract-{name}-{line}.json").read_text()) for name in ("fit", "test")]
            rows[-1]["images_per_second"] = sum(t["images"] for t in parts) / sum(t["seconds"] for t in parts)
            rows[-1]["cached"] = sum(t["cached"] for t in parts)
    return rows


def _trained(fit: FeatureShards, params: TrainParams) -> TrainingState:
    be_deterministic()
    state = start(fit, params)
    train(state, fit, params)
    finish(state, fit)
    return state


def _figures(
    state: TrainingState, params: TrainParams, fit: FeatureShards, test: FeatureShards
) -> dict[str, float | None]:
    normal, anomalous = (Sample(test, test.rows(label=label)).scores(state.scorer) for label in ("normal", "anomalous"))
    held = Sample(fit, fit.rows(split="calibrate")).scores(state.scorer)
    calibration: Calibration = calibrate(held, np.zeros(1, dtype=np.float32), params.calibration)
    return {
        "image_auroc": auroc(normal, anomalous),
        "fpr": float((normal > calibration.threshold).mean()),
        "tpr": float((anomalous > calibration.threshold).mean()),
    }


def _neighbours(state: TrainingState, fit: FeatureShards, test: FeatureShards) -> float | None:
    train_rows, fusion = fit.rows(split="train"), state.scorer.fusion
    normal, anomalous = (
        neighbours.scores(fusion, fit, train_rows, test, test.rows(label=label), seed=0)
        for label in ("normal", "anomalous")
    )
    return auroc(normal, anomalous)


def _random_split(line: str, params: TrainParams) -> dict[str, Any]:
    """As many normals in each split, but dealt out at random: neighbours of a module on both sides."""
    fit, test = (FeatureShards.open(PROJECT / f"data/features/{line}/{name}") for name in ("fit", "test"))
    folder = PROJECT / RunSettings().work / "random" / line
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    offset = fit.header["partitions"]
    for shards, first in ((fit, 0), (test, offset)):
        for number in range(shards.header["partitions"]):
            (folder / part_name(first + number)).symlink_to(shards.folder / part_name(number))
    for name in ("backbone.safetensors", REJECTED):
        (folder / name).symlink_to(fit.folder / name)
    moved = test.index.set_column(
        test.index.schema.get_field_index("partition"), "partition", pc.add(test.index["partition"], offset)
    )
    table = pa.concat_tables([fit.index, moved]).to_pylist()
    normals = [row for row in table if row["label"] == "normal"]
    splits = [row["split"] for row in normals]
    for row, place in zip(normals, np.random.default_rng(0).permutation(len(splits)), strict=True):
        row["split"] = splits[place]
    seal(folder, pa.Table.from_pylist(table), fit.levels, {"backbone": fit.header["backbone"]})
    mixed = FeatureShards.open(folder)
    state = _trained(mixed, params)
    normal = Sample(mixed, mixed.rows(split="test", label="normal")).scores(state.scorer)
    anomalous = Sample(mixed, mixed.rows(label="anomalous")).scores(state.scorer)
    return {"line": line, "what": f"random split, seed {params.seed}", "image_auroc": auroc(normal, anomalous)}


def _latency(line: str) -> list[dict[str, Any]]:
    """Median milliseconds of one image on one thread, in processor time, backbone and head taken in turn."""
    torch.set_num_threads(1)
    detector = load_bundle(PROJECT / f"models/{line}").detector()
    image_BYX3 = torch.zeros((1, *detector.image_size, 3), dtype=torch.uint8)
    levels = detector.backbone(image_BYX3)
    backbone, head = [], []
    for _ in range(30):
        backbone.append(_milliseconds(lambda: detector.backbone(image_BYX3)))
        head.append(_milliseconds(lambda: detector.scorer(levels)))
    torch.set_num_threads(THREADS)
    both = statistics.median(backbone), statistics.median(head)
    return [
        {"line": line, "what": "backbone, 1 image, 1 thread", "milliseconds": both[0]},
        {
            "line": line,
            "what": "flow and score, 1 image, 1 thread",
            "milliseconds": both[1],
            "share": both[1] / both[0],
        },
    ]


def _milliseconds(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return 1000 * (time.thread_time() - started)


if __name__ == "__main__":
    main()
