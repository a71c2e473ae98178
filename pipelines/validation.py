"""What a trial of the search trains on, and the images it is judged by: none of the line's test split.

synthetic: normals that the trial does not train on, and damaged copies of them
labelled:  a folder of yours with normal/ and anomalous/
"""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.feature_cache import feature_cache
from pipelines.lock import alone
from pipelines.search_space import LabelledImages, SyntheticDefects
from wtflow.artefact import digest_of, replacing, sha256_bytes, sha256_file
from wtflow.data import images, synthetic
from wtflow.data.images import ImageLimits
from wtflow.data.manifest import Manifest
from wtflow.data.shards import COPY, FeatureShards
from wtflow.detector import Scorer
from wtflow.errors import WTFlowError
from wtflow.features.backbone import BackboneParams, build_backbone, load_weights
from wtflow.features.extract import ExtractParams, Job, extract
from wtflow.scoring.metrics import auroc

Objective = SyntheticDefects | LabelledImages
SCORED_AT_ONCE = 32
HELD_OUT = "validate"
UNUSED = "unused"
SIZES = {"partition_size": 64, "batch_size": 16}
LABELS = ("normal", "anomalous")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """Some rows of some features."""

    shards: FeatureShards
    rows: list[int]

    def scores(self, scorer: Scorer) -> NDArray[np.float64]:
        """Image scores, in the order of the rows."""
        batches = self.shards.batches(self.rows, SCORED_AT_ONCE)
        return np.concatenate([scorer(levels)[1].double().numpy() for levels in batches])


@dataclass(frozen=True)
class Validation:
    """Training features and judged images, as a trial opens them."""

    fit: FeatureShards
    """The split `train` lacks what is held out."""
    normal: Sample
    anomalous: dict[str, Sample]
    """By kind of defect."""

    @classmethod
    def open(cls, features: Path, judged: Path, objective: Objective, verify: bool = True) -> "Validation":
        """`features`: the line's fit features; `judged`: what `judged_features` made."""
        fit = FeatureShards.open(features, verify)
        other = FeatureShards.open(judged, verify)
        if isinstance(objective, LabelledImages):
            normal, anomalous = (Sample(other, other.rows(label=label)) for label in LABELS)
            return cls(fit, normal, {"labelled": anomalous})
        fit = held_out(fit, objective)
        normal = Sample(fit, fit.rows(split="calibrate" if objective.normals == "calibrate" else HELD_OUT))
        return cls(fit, normal, {kind: Sample(other, other.rows(defect=kind)) for kind in objective.defects})

    @property
    def digests(self) -> list[str]:
        """Of the features that are trained on, and of those of the judged images."""
        return [self.fit.digest, next(iter(self.anomalous.values())).shards.digest]

    def criterion(self, scorer: Scorer) -> dict[str, float]:
        """Image AUROC against the normal images, by kind, and `score`, their mean: what the search raises."""
        normal = self.normal.scores(scorer)
        found = {f"auroc/{kind}": auroc(normal, sample.scores(scorer)) for kind, sample in self.anomalous.items()}
        known = {name: value for name, value in found.items() if value is not None}
        return {**known, "score": sum(known.values()) / len(known)}


def held_out(fit: FeatureShards, objective: SyntheticDefects) -> FeatureShards:
    """The same features; some groups of `train` are in the split `validate`, if the objective wants normals of it.
    Copies of their images serve for nothing."""
    if objective.normals == "calibrate":
        return fit
    splits, groups = fit.index["split"].to_pylist(), fit.index["group"].to_pylist()
    trained = {group for group, split in zip(groups, splits, strict=True) if split == "train"}
    ordered = sorted(trained, key=lambda group: sha256_bytes(f"{objective.seed}:{group}".encode()))
    if len(ordered) < 2:
        raise WTFlowError(f"{fit.folder}: one group only in `train`; set tune.objective.normals: calibrate.")
    taken = set(ordered[: min(len(ordered) - 1, math.ceil(objective.share * len(ordered)))])
    moves = {"train": HELD_OUT, COPY: UNUSED}
    changed = [
        moves.get(split, split) if group in taken else split for group, split in zip(groups, splits, strict=True)
    ]
    column = fit.index.schema.get_field_index("split")
    return replace(fit, index=fit.index.set_column(column, "split", pa.array(changed)))


def judged_features(
    line: str, objective: Objective, work: Path, place: Path = Path(), photographs: Path | None = None
) -> Path:
    """Features of the images that no stage extracts: once through the frozen backbone, then read by every trial.

    They are below `work`, under a name that says what they were made of; another process that wants the same ones waits
    for them. Damaged ones are made again. `place` holds the line's data/, `photographs` are in data/raw/<line> of it if
    they are nowhere else.
    """
    fit = FeatureShards.open(place / f"data/features/{line}/fit")
    backbone = BackboneParams.parse(fit.header["backbone"], f"{fit.folder}/index.json: backbone")
    limits = ImageLimits.parse(fit.header["limits"], f"{fit.folder}/index.json: limits")
    if isinstance(objective, LabelledImages):
        raw = Path(objective.folder)
        rows = labelled_rows(raw, line, place)
    else:
        view = held_out(fit, objective)
        split = "calibrate" if objective.normals == "calibrate" else HELD_OUT
        clean = [row for row in view.index.to_pylist() if row["split"] == split]
        code = [sha256_file(Path(str(module.__file__))) for module in (synthetic, images)]
        name = digest_of([objective.seed, backbone.image_size, code])
        raw = work / line / f"damaged-{name[:12]}"
        source = photographs or place / f"data/raw/{line}"
        size, kinds = backbone.image_size, objective.defects
        rows = synthetic.write_damaged(clean, source, raw, size, limits, kinds, objective.seed)
    facts = {
        "line": line,
        "data_version": fit.data_version,
        "manifest_digest": digest_of([[row["image_id"], row["label"], row["path"]] for row in rows]),
        "backbone": backbone.model_dump(mode="json"),
        "limits": limits.model_dump(mode="json"),
    }
    folder = work / line / f"features-{digest_of([facts, fit.header['backbone_digest']])[:12]}"
    with alone(folder.with_name(f"{folder.name}.lock")):
        if not _is_whole(folder):
            network = build_backbone(backbone, load_weights(fit.folder / "backbone.safetensors"))
            if network.digest != fit.header["backbone_digest"]:
                raise WTFlowError(
                    f"{fit.folder}/index.json: backbone_digest is not that of its weights under this version of the "
                    f"code. Type: dvc repro --force extract@{line}"
                )
            params = ExtractParams.parse({"backbone": facts["backbone"], **SIZES}, "features of the search")
            _extract(rows, folder, Job(raw, feature_cache(), network, params, limits), facts)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether features are there, each file as it was written."""
    if not (folder / "index.json").exists():
        return False
    try:
        FeatureShards.open(folder)
    except WTFlowError as error:
        logger.warning("%s: damaged, and made again (%s)", folder, error)
        return False
    return True


def _extract(rows: list[dict[str, Any]], folder: Path, job: Job, facts: dict[str, Any]) -> None:
    """Raises `WTFlowError` for an image that cannot be read."""
    with replacing(folder) as draft:
        rejected = extract(rows, draft, job, facts).rejected
        if rejected.num_rows:
            first = rejected.to_pylist()[0]
            where = job.raw / first["path"]
            raise WTFlowError(f"{where}: {first['reason']}: {first['detail']}. Mend it, or take it away.")


def labelled_rows(folder: Path, line: str, place: Path) -> list[dict[str, Any]]:
    """An image a row, of `normal` and `anomalous`. None may be one that the line trains with or is tested on."""
    manifest = Manifest.read(place / f"data/prepared/{line}/manifest.parquet")
    known = {row["image_id"]: row["split"] for row in manifest.rows()}
    rows = []
    for label in LABELS:
        found = sorted(path for path in (folder / label).glob("**/*") if path.is_file())
        if not found:
            raise WTFlowError(f"tune.objective.folder: {folder / label} holds no image. Put some there.")
        for path in found:
            image_id = sha256_file(path)
            if image_id in known:
                raise WTFlowError(f"{path}: is in the split `{known[image_id]}` of {line} already. Take it away.")
            name = str(path.relative_to(folder))
            fact = {"line": line, "group": image_id, "split": HELD_OUT, "defect": ""}
            rows.append({"image_id": image_id, "path": name, "label": label, **fact})
    return sorted(rows, key=lambda row: str(row["image_id"]))
