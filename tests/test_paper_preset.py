"""The paper's network, which no other test is large enough for."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml

from pipelines.lines import read_params
from tests import tiny_line
from tests.guards.closure import ROOT
from wtflow.artefact import save_tensors, sha256_file
from wtflow.bundle import BundleConfig, load_bundle, write_bundle
from wtflow.data.images import ImageLimits, decode
from wtflow.data.manifest import Manifest
from wtflow.data.shards import FeatureShards
from wtflow.detector import Scorer
from wtflow.features.backbone import build_backbone
from wtflow.features.cache import FeatureCache
from wtflow.features.extract import ExtractParams, Job, extract
from wtflow.flow.velocity import build_field
from wtflow.params import merged
from wtflow.scoring.calibration import calibrate
from wtflow.training import TrainParams, finish, start, train

WIDTH = int(os.environ.get("WTFLOW_TEST_PAPER_WIDTH", "384"))
"""Half the preset's, unless asked: at 768 the whole needs 21 GB. docs/operations.md."""
TRAIN_IMAGES, CALIBRATE_IMAGES = 8, 6


def section(stage: str) -> dict[str, Any]:
    """The default's settings of a stage under the preset."""
    preset = yaml.safe_load((ROOT / "presets" / "paper.yaml").read_text())
    return merged(read_params(ROOT / "params.yaml")[stage], preset[stage])


def test_the_field_has_the_size_that_the_paper_is_run_with() -> None:
    params = TrainParams.parse(section("train"), "presets/paper.yaml")
    backbone = ExtractParams.parse(section("extract"), "presets/paper.yaml").backbone
    with torch.device("meta"):
        network = timm.create_model(backbone.name, features_only=True, out_indices=backbone.levels)
        places = backbone.image_size[0] // params.fusion.stride
        field = build_field(params.velocity, network.feature_info.channels()[0], (places, places))
    assert (network.feature_info.channels(), network.feature_info.reduction(), places) == ([1024], [16], 8)
    weights = sum(weight.numel() for weight in field.parameters())
    assert weights == 763_133_440
    # weights, gradients and AdamW's two moments, in float32: what docs/operations.md states
    assert round(4 * 4 * weights / 1e9, 1) == 12.2


@pytest.mark.slow
def test_a_step_of_it_trains_saves_and_scores(tiny_features: Path, tiny_raw: Path, tmp_path: Path) -> None:
    """Random weights of the backbone, which cannot be fetched here; half the width, which fits into memory."""
    torch.manual_seed(0)
    weights = tmp_path / "random.safetensors"
    save_tensors(weights, timm.create_model("wide_resnet50_2").state_dict())
    given = {"backbone": {"weights": str(weights), "sha256": sha256_file(weights)}}
    settings = ExtractParams.parse(merged(section("extract"), given), "tests")
    changes = {"epochs": 1, "velocity": {"width": WIDTH}, "calibration": {"target_fpr": 0.2}}
    params = TrainParams.parse(merged(section("train"), changes), "tests")
    shards = few_features(settings, tiny_features, tiny_raw, tmp_path / "fit")

    state = start(shards, params)
    assert -0.1 < state.scorer.c.item() < -0.02  # local worst transport amplifies the pull to the centre
    before = state.scorer.field.leave.weight.clone()
    train(state, shards, params)
    assert len(state.history) == 1
    assert not torch.equal(state.scorer.field.leave.weight, before)
    scorer = finish(state, shards)
    del state  # the optimiser's moments are half of the memory

    path = tmp_path / "bundle"
    write(path, scorer, shards, settings, params)
    detector = load_bundle(path).detector()
    photographs = [decode((tiny_raw / name).read_bytes(), detector.limits) for name in shards.index["path"].to_pylist()]
    _, cached_B = scorer(shards.batch(range(len(shards))))
    fresh = [detector.verdicts([photograph])[0].score for photograph in photographs]
    np.testing.assert_allclose(fresh, cached_B.numpy(), rtol=0, atol=1e-5)
    assert np.isfinite(fresh).all()
    assert np.ptp(fresh) > 0


def few_features(settings: ExtractParams, root: Path, raw: Path, folder: Path) -> FeatureShards:
    """Features of a few photographs, enough for a step and a threshold."""
    manifest = Manifest.read(root / "data/prepared" / tiny_line.LINE / "manifest.parquet")
    rows = [*manifest.rows("train")[:TRAIN_IMAGES], *manifest.rows("calibrate")[:CALIBRATE_IMAGES]]
    limits = ImageLimits.parse(tiny_line.PREPARE["limits"], "tests")
    job = Job(raw, FeatureCache(folder.with_name("cache")), build_backbone(settings.backbone), settings, limits)
    facts = tiny_line.facts(manifest) | {"backbone": settings.backbone.model_dump(mode="json")}
    extract(rows, folder, job, facts)
    return FeatureShards.open(folder)


def write(path: Path, scorer: Scorer, shards: FeatureShards, settings: ExtractParams, params: TrainParams) -> None:
    """The bundle of what was trained."""
    config = BundleConfig(
        backbone=settings.backbone,
        fusion=params.fusion,
        inputs=scorer.fusion.inputs,
        map_size=scorer.fusion.size,
        coupling=params.coupling,
        velocity=params.velocity,
        solver=params.solver,
        score=params.score,
        limits=ImageLimits.parse(tiny_line.PREPARE["limits"], "tests"),
    )
    map_BHW, score_B = scorer(shards.batch(shards.rows(split="calibrate")))
    calibration = calibrate(score_B.double().numpy(), map_BHW.numpy(), params.calibration)
    weights = build_backbone(settings.backbone).network.state_dict()
    write_bundle(path, config, weights, scorer, calibration, {"line": tiny_line.LINE})
