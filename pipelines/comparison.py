"""Two bundles on one test set: what may be compared, and how the older one scores on today's images."""

from pathlib import Path

import numpy as np

from pipelines.evaluation import read_raw, score
from wtflow.artefact import digest_of
from wtflow.bundle import Bundle
from wtflow.data.images import decode
from wtflow.data.shards import FeatureShards
from wtflow.scoring.metrics import auroc


def test_set_digest(shards: FeatureShards) -> str:
    """Identity of the test images and their labels, whatever features were extracted from them."""
    return digest_of(shards.index.select(["image_id", "label"]).to_pylist())


def image_auroc(bundle: Bundle, shards: FeatureShards, raw: Path) -> float | None:
    """Image AUROC of `bundle` on the images of `shards`: from the features if they are its own, else from `raw`."""
    detector = bundle.detector()
    if detector.backbone.digest == shards.header["backbone_digest"]:
        scores = [(image.label, image.verdict.score) for image in score(detector, shards)]
    else:
        rows = shards.index.select(["path", "label"]).to_pylist()
        pictures = ((row["label"], decode(read_raw(raw / row["path"]), detector.limits)) for row in rows)
        scores = [(label, detector.verdicts([picture])[0].score) for label, picture in pictures]
    normal, anomalous = (np.array([s for label, s in scores if label == wanted]) for wanted in ("normal", "anomalous"))
    return auroc(normal, anomalous)
