"""The lines that benchmarks measure on: those of params.yaml, and magnetic-tile where its images are at hand."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pipelines.feature_cache import feature_cache
from pipelines.lines import line_params, read_params
from pipelines.preset import read_presets, with_preset
from pipelines.validation import Sample
from wtflow.artefact import replacing
from wtflow.data.manifest import Manifest, PrepareParams, Split
from wtflow.data.prepare import prepare
from wtflow.data.shards import FeatureShards
from wtflow.detector import Scorer
from wtflow.features.augment import with_copies
from wtflow.features.backbone import build_backbone
from wtflow.features.extract import ExtractParams, Job, extract
from wtflow.scoring.metrics import auroc
from wtflow.training import TrainParams, be_deterministic, finish, start, train

PROJECT = Path(__file__).parents[1]
PLACE = PROJECT / ".wtflow" / "bench"
TILE = "magnetic-tile"
TILE_SETTINGS: dict[str, dict[str, str]] = {
    "prepare": {"layout": "mvtec_ad", "group_pattern": r"(view\d+)"},
    **{stage: {} for stage in ("extract", "train", "evaluate", "register")},
}
OUTPUTS: dict[str, tuple[Split, ...]] = {"fit": ("train", "calibrate"), "test": ("test",)}


@dataclass(frozen=True)
class ProductLine:
    """Where a line's images, manifest and features are."""

    name: str
    place: Path
    """Folder with params.yaml, data/prepared and data/features."""
    raw: Path
    """Where the manifest's paths start."""

    @cached_property
    def manifest(self) -> Manifest:
        """Every image and its split."""
        return Manifest.read(self.place / f"data/prepared/{self.name}/manifest.parquet")

    @property
    def extract_params(self) -> ExtractParams:
        """Backbone, levels and image size."""
        return line_params(self.name, "extract", ExtractParams, self.place / "params.yaml")

    @property
    def train_params(self) -> TrainParams:
        """The line's settings as they stand."""
        return line_params(self.name, "train", TrainParams, self.place / "params.yaml")

    @property
    def prepare_params(self) -> PrepareParams:
        """Splits and limits."""
        return line_params(self.name, "prepare", PrepareParams, self.place / "params.yaml")

    def features(self, name: str) -> Path:
        """Folder of the feature shards `fit` or `test`."""
        return self.place / f"data/features/{self.name}/{name}"

    def shards(self, name: str) -> FeatureShards:
        """The opened features."""
        return FeatureShards.open(self.features(name))


def trained(fit: FeatureShards, params: TrainParams) -> Scorer:
    """The plain loop on these features, in this process."""
    be_deterministic()
    state = start(fit, params)
    train(state, fit, params)
    return finish(state, fit)


def image_auroc(scorer: Scorer, test: FeatureShards) -> float:
    """Of anomalous against normal images of a test split, which has both."""
    normal, anomalous = (Sample(test, test.rows(label=label)).scores(scorer) for label in ("normal", "anomalous"))
    value = auroc(normal, anomalous)
    assert value is not None
    return value


def product_lines() -> list[ProductLine]:
    """The lines of params.yaml (`make repro` brings their data), and magnetic-tile if WTFLOW_SHARED_DATA is set."""
    params = read_params(PROJECT / "params.yaml")
    lines = [ProductLine(name, PROJECT, PROJECT / f"data/raw/{name}") for name in params["lines"]]
    return [*lines, tile_line()] if "WTFLOW_SHARED_DATA" in os.environ else lines


def tile_line() -> ProductLine:
    """magnetic-tile, prepared in a workplace of its own; its features are still to be extracted."""
    params = {**read_params(PROJECT / "params.yaml"), "fetch": {}, "lines": {TILE: TILE_SETTINGS}}
    with replacing(PLACE / "params.yaml") as draft:  # several benchmarks may run at a time
        draft.write_text(yaml.safe_dump(params, sort_keys=False))
    line = ProductLine(TILE, PLACE, Path(os.environ["WTFLOW_SHARED_DATA"], "magnetic_tile"))
    manifest = prepare(line.raw, TILE, line.prepare_params).manifest
    manifest.write(PLACE / f"data/prepared/{TILE}/manifest.parquet")
    return line


def moved(line: ProductLine, place: Path, params: Mapping[str, Any], manifest: Manifest) -> ProductLine:
    """The line in a workplace of its own, with these settings and images. Its features are still to be extracted."""
    with replacing(place / "params.yaml") as draft:
        draft.write_text(yaml.safe_dump({**params, "fetch": {}}, sort_keys=False))
    manifest.write(place / f"data/prepared/{line.name}/manifest.parquet")
    return ProductLine(line.name, place, line.raw)


def laid_over(line: ProductLine, preset: str) -> ProductLine:
    """The line with a preset's settings."""
    params = read_params(line.place / "params.yaml")
    sections = with_preset(params["lines"][line.name], read_presets(), preset)
    place = PLACE / "presets" / preset / line.name
    return moved(line, place, {**params, "lines": {line.name: sections}}, line.manifest)


def extract_features(line: ProductLine) -> None:
    """Bring the features of a line that no stage extracts up to date; nothing is computed twice."""
    if line.place == PROJECT:
        return
    params, manifest = line.extract_params, line.manifest
    job = Job(line.raw, feature_cache(), build_backbone(params.backbone), params, line.prepare_params.limits)
    facts = {
        "line": line.name,
        "data_version": manifest.data_version,
        "manifest_digest": manifest.digest,
        "backbone": params.backbone.model_dump(mode="json"),
        "limits": line.prepare_params.limits.model_dump(mode="json"),
    }
    for name, splits in OUTPUTS.items():
        extract(with_copies(manifest.rows(*splits), params.augment), line.features(name), job, facts)
