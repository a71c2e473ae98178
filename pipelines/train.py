"""Stage `train`: a line's features -> its bundle. Training and threshold see normal images only.

data/features/<line>/fit/ -> models/<line>/ (bundle), plots/<line>.csv (loss by epoch)
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from pipelines.adapters import ray_train
from pipelines.adapters.tracking import TrainingRun
from pipelines.environment import RunSettings, progress
from pipelines.kept_field import field_digest, keep_field, kept_field
from pipelines.lines import line_params
from pipelines.lock import alone
from pipelines.provenance import code_commit, library_versions, stage_code
from pipelines.stage import run
from wtflow.artefact import digest_of, replacing
from wtflow.bundle import BundleConfig, write_bundle
from wtflow.data.images import ImageLimits
from wtflow.data.shards import FeatureShards
from wtflow.detector import Scorer
from wtflow.features.backbone import BackboneParams, load_weights
from wtflow.scoring.calibration import Calibration, calibrate, conformal_rank
from wtflow.training import Epoch, TrainingState, TrainParams, finish

SCORED_AT_ONCE = 32

Fit = Callable[[str, Path, TrainParams, RunSettings, Callable[[Epoch], None]], TrainingState]
"""Trains the run of a name on a folder of features: `ray_train.fit`, or another place with the same result."""


@dataclass(frozen=True)
class Trained:
    """What came out of a training."""

    name: str
    """Of the run: see `run_name`."""
    digest: str
    """Of the bundle."""
    loss: float
    calibration: Calibration
    was_kept: bool
    """Whether the field had been trained before: see `kept_field`."""


def main(line: str) -> None:
    """Train `line` and write its bundle and loss curve."""
    settings = RunSettings()
    torch.set_num_threads(settings.cores())
    params = line_params(line, "train", TrainParams)
    with progress(f"train {line}", params.epochs) as bar:

        def on_epoch(epoch: Epoch) -> None:
            told = f"loss {epoch.loss:.4f}, mean y² {epoch.mean_y2:.3f}, {epoch.images_per_s:.0f} images/s"
            bar.update(bar.task_ids[0], completed=epoch.epoch + 1, description=f"train {line}: {told}")

        done = train_line(line, params, settings, ray_train.fit, on_epoch)
    trained = "field kept, not trained again" if done.was_kept else f"{params.epochs} epochs"
    Console().print(
        f"train {line}: {trained}, loss {done.loss:.4f}, threshold {done.calibration.threshold:.4f} "
        f"for {done.calibration.target_fpr:.1%} false alarms from {len(done.calibration.scores)} normals; "
        f"bundle {done.digest[:12]}",
        highlight=False,
        soft_wrap=True,
    )


def train_line(
    line: str, params: TrainParams, settings: RunSettings, fit: Fit, on_epoch: Callable[[Epoch], None]
) -> Trained:
    """Train by `fit`, calibrate, and write the bundle and the loss curve; followed in MLflow. A field that was trained
    before is taken from where it is kept. Raises `WTFlowError` while another process trains the line."""
    lock = settings.work / "locks" / f"train-{line}.lock"
    with alone(
        lock, f"{lock}: another process trains {line}. Wait for its end, or stop it; then type the same command."
    ):
        return _train_line(line, params, settings, fit, on_epoch)


def _train_line(
    line: str, params: TrainParams, settings: RunSettings, fit: Fit, on_epoch: Callable[[Epoch], None]
) -> Trained:
    features = features_folder(line)
    shards = FeatureShards.open(features)
    conformal_rank(len(shards.rows(split="calibrate")), params.calibration.target_fpr)  # said now, not after training
    code = stage_code("train")
    name = run_name(line, params, shards, code)
    field, place = field_digest(params, shards, code, settings.num_workers), settings.work / "fields" / line
    kept = kept_field(place, field, shards, params)
    with TrainingRun(line, name, params) as tracked:

        def heard(epoch: Epoch) -> None:
            on_epoch(epoch)
            tracked.log(epoch)

        if kept is None:
            state = fit(name, features, params, settings, heard)
        else:
            state = kept
            for epoch in state.history:
                heard(epoch)
        scorer = finish(state, shards)
        calibration = calibrated(scorer, shards, params)
        digest = _write(line, params, shards, state, calibration, list(code))
        tracked.finish(digest)
    if kept is None:
        keep_field(place, field, Path(f"models/{line}"), digest, state.history)
    ray_train.forget(name, settings)  # of a kept field, too: one that was killed here before left its checkpoints
    return Trained(name, digest, state.history[-1].loss, calibration, kept is not None)


def features_folder(line: str) -> Path:
    """Where a line's features for training are."""
    return Path(f"data/features/{line}/fit")


def run_name(line: str, params: TrainParams, shards: FeatureShards, code: Mapping[str, str]) -> str:
    """The line, and a digest of everything that decides the result."""
    facts = [params.model_dump(mode="json"), shards.digest, code, library_versions()]
    return f"{line}-{digest_of(facts)[:12]}"


def calibrated(scorer: Scorer, shards: FeatureShards, params: TrainParams) -> Calibration:
    """Threshold and p-values from the `calibrate` normals, which training has not seen."""
    scores, energies = [], []
    for levels in shards.batches(shards.rows(split="calibrate"), SCORED_AT_ONCE):
        map_BHW, score_B = scorer(levels)
        scores.append(score_B.double().numpy())
        energies.append(map_BHW.numpy().ravel())
    return calibrate(np.concatenate(scores), np.concatenate(energies), params.calibration)


def bundle_config(params: TrainParams, shards: FeatureShards, scorer: Scorer) -> BundleConfig:
    """What a bundle says of the networks that were trained on these features."""
    header = shards.header
    return BundleConfig(
        backbone=BackboneParams.parse(header["backbone"], f"{shards.folder}/index.json: backbone"),
        fusion=params.fusion,
        inputs=scorer.fusion.inputs,
        map_size=scorer.fusion.size,
        coupling=params.coupling,
        velocity=params.velocity,
        solver=params.solver,
        score=params.score,
        limits=ImageLimits.parse(header["limits"], f"{shards.folder}/index.json: limits"),
    )


def _write(
    line: str,
    params: TrainParams,
    shards: FeatureShards,
    state: TrainingState,
    calibration: Calibration,
    code: list[str],
) -> str:
    header, config = shards.header, bundle_config(params, shards, state.scorer)
    provenance = {
        "line": line,
        "seed": params.seed,
        "epochs": params.epochs,
        "train_images": len(shards.rows(split="train")),
        "calibrate_images": len(shards.rows(split="calibrate")),
        "git_commit": code_commit(code),
        "data_version": shards.data_version,
        "manifest_digest": header["manifest_digest"],
        "features_digest": shards.digest,
        "backbone_digest": header["backbone_digest"],
        "versions": library_versions(),
    }
    path = Path(f"models/{line}")
    try:
        weights = load_weights(shards.folder / "backbone.safetensors")
        digest = write_bundle(path, config, weights, state.scorer, calibration, provenance)
    except OSError as error:
        error.filename = error.filename or str(path)  # Python does not say which file a disk was too full for
        raise
    with replacing(Path(f"plots/{line}.csv")) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["epoch", "loss", "learning_rate"])
        table.writerows([epoch.epoch, f"{epoch.loss:.6f}", f"{epoch.learning_rate:.3e}"] for epoch in state.history)
    return digest


if __name__ == "__main__":
    run(main, __doc__ or "", "python -m pipelines.train solar-mono")
