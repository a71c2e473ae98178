"""The main job, measured: image AUROC by seed beside nearest neighbours, group split against random split, stage times.

Runs in a folder of its own under .wtflow/bench, so that models and registry of the checkout stay as they are. Features
are extracted once a line. The third line, magnetic-tile, comes in when WTFLOW_SHARED_DATA names its folder.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import yaml
from numpy.typing import NDArray

from benchmarks import neighbours
from benchmarks.report import at_least, at_most, parse_no_arguments, publish
from wtflow.bundle import load_bundle
from wtflow.data.shards import FeatureShards, part_name, seal
from wtflow.params import merged
from wtflow.scoring.calibration import Calibration, calibrate
from wtflow.scoring.metrics import auroc
from wtflow.training import TrainingState, TrainParams, start, train

SEEDS = (0, 1, 2)
PROJECT = Path(__file__).parents[1]
PLACE = PROJECT / ".wtflow" / "bench"
THREADS = len(os.sched_getaffinity(0))
TILE = {
    "prepare": {"layout": "mvtec_ad", "group_pattern": r"(view\d+)", "calibrate_fraction": 0.15},
    "extract": {}, "train": {}, "evaluate": {}, "register": {},
}  # fmt: skip


def main() -> None:
    """Run everything and publish benchmarks/results/main_job.json."""
    parse_no_arguments(__doc__ or "", "make bench NAME=main_job")
    torch.set_num_threads(THREADS)
    params = _workplace()
    rows = [row for line in params["lines"] for row in _line_rows(line, params)]
    claims = []
    for line, limit in {"solar-mono": 0.92, "solar-poly": 0.90}.items():
        mean = next(row["image_auroc"] for row in rows if row["line"] == line and row["what"] == "mean")
        claims.append(at_least(f"{line}: mean image AUROC over seeds 0, 1, 2", mean, limit))
    for line in params["lines"]:
        ours = next(row["image_auroc"] for row in rows if row["line"] == line and row["what"] == "mean")
        theirs = next(row["image_auroc"] for row in rows if row["line"] == line and row["what"] == "nearest neighbours")
        claims.append(
            at_least(f"{line}: mean image AUROC above nearest neighbours on the same features", ours - theirs, 0)
        )
    total = sum(
        row["seconds"]
        for row in rows
        if row["what"].startswith("stage ") and row["line"] in ("solar-mono", "solar-poly")
    )
    claims.append(at_most("minutes of all stages of solar-mono and solar-poly, one after the other", total / 60, 15))
    publish("main_job", rows, claims)


def _workplace() -> dict[str, Any]:
    """A folder with params.yaml (magnetic-tile in it when its images are here), DVC's graph and a registry of its own."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    params: dict[str, Any] = yaml.safe_load((PROJECT / "params.yaml").read_text())
    shared = os.environ.get("WTFLOW_SHARED_DATA")
    if shared:
        params["lines"]["magnetic-tile"] = TILE
        (PLACE / "data/raw").mkdir(parents=True)
        (PLACE / "data/raw/magnetic-tile").symlink_to(Path(shared, "magnetic_tile").resolve())
    else:
        print("WTFLOW_SHARED_DATA is not set: without magnetic-tile", file=sys.stderr)  # noqa: T201
    (PLACE / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    shutil.copy(PROJECT / "dvc.yaml", PLACE)
    return params


def _line_rows(line: str, params: dict[str, Any]) -> list[dict[str, Any]]:
    stages = ["prepare", "extract", "train", "evaluate", "register"]
    rows = [_stage(stage, line) for stage in (["fetch"] if line in params["fetch"] else []) + stages]
    settings = TrainParams.parse(merged(params["train"], params["lines"][line]["train"]), "train")
    fit, test = (FeatureShards.open(PLACE / f"data/features/{line}/{name}") for name in ("fit", "test"))
    by_stage = json.loads((PLACE / f"metrics/{line}.json").read_text())
    seeds = []
    for seed in SEEDS:
        seconds, values = time.perf_counter(), settings.model_copy(update={"seed": seed})
        state = _trained(fit, values)
        seeds.append({"line": line, "what": f"seed {seed}", **_figures(state, values, fit, test)})
        seeds[-1]["seconds"] = time.perf_counter() - seconds
    if abs(seeds[0]["image_auroc"] - by_stage["image_auroc"]) > 1e-6:
        raise SystemExit(
            f"{line}: the stage's image AUROC is {by_stage['image_auroc']}, "
            f"the benchmark's with the same seed {seeds[0]['image_auroc']}"
        )
    values = [row["image_auroc"] for row in seeds]
    mean = {key: statistics.mean(row[key] for row in seeds) for key in ("image_auroc", "fpr", "tpr")}
    rows += [*seeds, {"line": line, "what": "mean", **mean, "sd": statistics.stdev(values)}]
    rows.append({"line": line, "what": "nearest neighbours", "image_auroc": _neighbours(state, fit, test)})
    if line in params["fetch"]:
        rows.append(_random_split(line, settings))
    return [*rows, *_latency(line)]


def _stage(stage: str, line: str) -> dict[str, Any]:
    """One stage as DVC would run it, in a process of its own, with its wall seconds and peak memory."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "MLFLOW_TRACKING_URI": f"sqlite:///{PLACE}/mlflow.db"}
    subprocess.run([sys.executable, "-m", f"pipelines.{stage}", line], cwd=PLACE, check=True, env=environment)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    row = {"line": line, "what": f"stage {stage}", "seconds": time.perf_counter() - started, "peak_gib_so_far": peak}
    if stage == "extract":
        timings = [
            json.loads((PLACE / f".wtflow/timings/extract-{name}-{line}.json").read_text()) for name in ("fit", "test")
        ]
        row["images_per_second"] = sum(t["images"] for t in timings) / sum(t["seconds"] for t in timings)
    return row


def _trained(fit: FeatureShards, params: TrainParams) -> TrainingState:
    torch.use_deterministic_algorithms(True)
    state = start(fit, params)
    train(state, fit, params)
    return state


def _scores(state: TrainingState, shards: FeatureShards, rows: list[int]) -> NDArray[np.float64]:
    return np.concatenate([state.scorer(levels)[1].double().numpy() for levels in shards.batches(rows, 32)])


def _figures(
    state: TrainingState, params: TrainParams, fit: FeatureShards, test: FeatureShards
) -> dict[str, float | None]:
    normal, anomalous = (_scores(state, test, test.rows(label=label)) for label in ("normal", "anomalous"))
    held = _scores(state, fit, fit.rows(split="calibrate"))
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
    fit, test = (FeatureShards.open(PLACE / f"data/features/{line}/{name}") for name in ("fit", "test"))
    folder = PLACE / f"random/{line}"
    folder.mkdir(parents=True)
    offset = fit.header["partitions"]
    for shards, first in ((fit, 0), (test, offset)):
        for number in range(shards.header["partitions"]):
            (folder / part_name(first + number)).symlink_to(shards.folder / part_name(number))
    (folder / "backbone.safetensors").symlink_to(fit.folder / "backbone.safetensors")
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
    normal = _scores(state, mixed, mixed.rows(split="test", label="normal"))
    anomalous = _scores(state, mixed, mixed.rows(label="anomalous"))
    return {"line": line, "what": f"random split, seed {params.seed}", "image_auroc": auroc(normal, anomalous)}


def _latency(line: str) -> list[dict[str, Any]]:
    """Median milliseconds of one image on one thread, backbone and head taken in turn."""
    torch.set_num_threads(1)
    detector = load_bundle(PLACE / f"models/{line}").detector()
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
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    main()
