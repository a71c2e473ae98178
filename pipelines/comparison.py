"""Two bundles on one test set: what may be compared, and how the older one scores on today's images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.evaluation import BATCH, DECIMALS, read_raw
from wtflow.artefact import digest_of
from wtflow.bundle import Bundle
from wtflow.data.images import decode
from wtflow.data.shards import FeatureShards
from wtflow.scoring.metrics import auroc


def test_set_digest(shards: FeatureShards) -> str:
    """Identity of the test images and their labels, whatever features were extracted from them."""
    return digest_of(shards.index.select(["image_id", "label"]).to_pylist())


def image_auroc(bundle: Bundle, shards: FeatureShards, raw: Path, rows: Sequence[int] | None = None) -> float | None:
    """Image AUROC of `bundle` on `rows` of `shards`, or on all: from the features if they are its own, else from the
    photographs in `raw`. Rounded as metrics are; None without normal or without anomalous images."""
    rows = range(len(shards)) if rows is None else rows
    detector = bundle.detector()
    if detector.backbone.digest == shards.header["backbone_digest"]:
        batches = shards.batches(list(rows), BATCH)
        verdicts = [verdict for levels in batches for verdict in detector.verdicts_of_features(levels)]
    else:
        paths = shards.index["path"].take(list(rows)).to_pylist()
        pictures = (decode(read_raw(raw / path), detector.limits) for path in paths)
        verdicts = [detector.verdicts([picture])[0] for picture in pictures]
    labels = shards.index["label"].take(list(rows)).to_pylist()
    normal, anomalous = (
        np.array([verdict.score for label, verdict in zip(labels, verdicts, strict=True) if label == wanted])
        for wanted in ("normal", "anomalous")
    )
    found = auroc(normal, anomalous)
    return None if found is None else round(found, DECIMALS)
