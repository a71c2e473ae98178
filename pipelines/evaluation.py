"""What a bundle makes of a line's test split: a verdict for each image, and the figures over them.

    test shards --detector--> a ScoredImage each --scores--> image figures, normal against anomalous
                                                 --maps at one resolution, masks--> pixel figures

Uncertain images are scored, and counted by themselves: no headline figure knows them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from wtflow.bundle import Bundle
from wtflow.data.images import ImageLimits
from wtflow.data.masks import SATURATIONS, Saturation, mask_files, read_marks, read_saturations
from wtflow.data.shards import FeatureShards
from wtflow.detector import Detector, Verdict
from wtflow.errors import WTFlowError
from wtflow.scoring.anomaly_map import enlarge
from wtflow.scoring.bootstrap import Interval, bootstrap
from wtflow.scoring.metrics import (
    PixelMetrics,
    PixelResult,
    SaturatedRegion,
    auroc,
    average_precision,
    f1_max,
    saturation_area,
)

BATCH = 32
DECIMALS = 6
CHANCE = 0.5
"""Image AUROC of scores that know nothing."""
WHOLE = Saturation(1.0, relative=True)


@dataclass(frozen=True)
class ScoredImage:
    """A test image, named as in the manifest, and what the bundle says of it."""

    image_id: str
    path: str
    """Below the line's raw folder."""
    label: str
    """`normal`, `anomalous` or `uncertain`."""
    defect: str
    group: str
    """Images of one group resemble each other."""
    mask_path: str | None
    """Below the raw folder: a file, or a folder with a file for each region."""
    verdict: Verdict


@dataclass(frozen=True)
class PixelEvaluation:
    """Pixel figures, and which images are behind them."""

    result: PixelResult
    resolution: tuple[int, int]
    """Height and width at which maps and masks were compared."""
    masked: int
    """Anomalous images with a mask that marks something."""
    left_out: int
    """Anomalous images without one: where they are defective is not known."""
    spro_05: float | None = None
    """Area under sPRO up to an FPR of 0.05, the mean over the kinds of defect, each with all normal images, as the
    evaluation code of MVTec LOCO AD does; None where masks are not drawn region by region."""


@dataclass(frozen=True)
class Evaluation:
    """A bundle's whole result on a line's test split."""

    line: str
    bundle: Bundle
    data_version: str
    images: Sequence[ScoredImage]
    """Sorted by image_id."""
    pixels: PixelEvaluation

    def labelled(self, label: str) -> list[ScoredImage]:
        """The images of one label."""
        return [image for image in self.images if image.label == label]

    def scores(self, label: str) -> NDArray[np.float64]:
        """Their scores."""
        return np.array([image.verdict.score for image in self.labelled(label)], dtype=np.float64)

    def flagged(self, label: str) -> int:
        """How many of them the bundle calls anomalous."""
        return sum(image.verdict.is_anomalous for image in self.labelled(label))

    def flagged_share(self, label: str) -> float | None:
        """Their share; None if there are no images of this label."""
        images = self.labelled(label)
        return self.flagged(label) / len(images) if images else None

    def f1(self) -> float | None:
        """F1 at the bundle's threshold; None without an anomalous image."""
        found, anomalous = self.flagged("anomalous"), len(self.labelled("anomalous"))
        return 2 * found / (found + self.flagged("normal") + anomalous) if anomalous else None

    def auroc_interval(self) -> Interval | None:
        """Where image AUROC lies with 95 %, groups of images drawn anew; None where it is."""
        return self._auroc_interval

    @cached_property
    def _auroc_interval(self) -> Interval | None:
        labels = [self.labelled(label) for label in ("normal", "anomalous")]
        normal, anomalous = (
            (np.array([image.verdict.score for image in images]), [image.group for image in images])
            for images in labels
        )
        return bootstrap(auroc, normal, anomalous)

    def at_chance(self) -> Interval | None:
        """The interval of image AUROC if 0.5 is in it or above it: as far as these images tell, scores part normal from
        anomalous no better than chance. None if they do better, and where there is no AUROC."""
        interval = self.auroc_interval()
        return interval if interval and interval.low <= CHANCE else None

    def metrics(self) -> dict[str, Any]:
        """The headline figures, as metrics/<line>.json holds them. Undefined ones are None."""
        normal, anomalous = self.scores("normal"), self.scores("anomalous")
        best = f1_max(normal, anomalous)
        calibration, pixels = self.bundle.calibration, self.pixels.result
        figures: dict[str, Any] = {
            "image_auroc": auroc(normal, anomalous),
            "image_ap": average_precision(normal, anomalous),
            "image_f1": self.f1(),
            "image_f1_max": best.f1 if best else None,
            "pixel_auroc": pixels.pixel_auroc,
            "pixel_ap": pixels.pixel_ap,
            "pixel_aupro_30": pixels.aupro_30,
            "pixel_aupro_05": pixels.aupro_05,
            "pixel_spro_05": self.pixels.spro_05,
            "threshold": calibration.threshold,
            "target_fpr": calibration.target_fpr,
            "fpr": self.flagged_share("normal"),
            "tpr": self.flagged_share("anomalous"),
            "n_test_normal": len(normal),
            "n_test_anomalous": len(anomalous),
            "uncertain_above_threshold": self.flagged_share("uncertain"),
            "bundle_digest": self.bundle.digest,
            "seed": self.bundle.provenance["seed"],
        }
        return {key: round(value, DECIMALS) if isinstance(value, float) else value for key, value in figures.items()}


def evaluate(line: str, bundle: Bundle, shards: FeatureShards, raw: Path, resolution: tuple[int, int]) -> Evaluation:
    """Score all of `shards` with `bundle`. Masks come from `raw`, where the manifest's paths start."""
    detector = bundle.detector()
    found, expected = shards.header["backbone_digest"], detector.backbone.digest
    if found != expected:
        raise WTFlowError(
            f"{shards.folder}: features of backbone {found[:12]}, but {bundle.path} was trained on "
            f"{expected[:12]}. Extract and train again: dvc repro"
        )
    images = score(detector, shards)
    pixels = evaluate_pixels(images, raw, resolution, bundle.config.limits)
    return Evaluation(line, bundle, shards.data_version, images, pixels)


def score(detector: Detector, shards: FeatureShards) -> list[ScoredImage]:
    """A verdict for each image of `shards`, sorted by image_id."""
    rows = list(range(len(shards)))
    verdicts = [verdict for levels in shards.batches(rows, BATCH) for verdict in detector.verdicts_of_features(levels)]
    columns = ("image_id", "path", "label", "defect", "group", "mask_path")
    images = [
        ScoredImage(**record, verdict=verdict)
        for record, verdict in zip(shards.index.select(columns).to_pylist(), verdicts, strict=True)
    ]
    return sorted(images, key=lambda image: image.image_id)


def evaluate_pixels(
    images: Sequence[ScoredImage], raw: Path, resolution: tuple[int, int], limits: ImageLimits
) -> PixelEvaluation:
    """Maps of normal and anomalous images against their masks; a normal image has an empty one.

    An anomalous image whose mask is missing or marks nothing is left out, and counted. Without any mask all
    figures are None. sPRO is there if any mask is a folder of regions.
    """
    pixels, good, masked, left_out = PixelMetrics(), PixelMetrics(), 0, 0
    by_defect: defaultdict[str, PixelMetrics] = defaultdict(PixelMetrics)
    by_region = any(image.mask_path and (raw / image.mask_path).is_dir() for image in images)
    saturations = read_saturations(raw) if by_region and (raw / SATURATIONS).is_file() else {}
    for image in images:
        wanted = image.mask_path if image.label == "anomalous" else None
        regions = read_regions(raw, wanted, resolution, limits, saturations) if wanted else []
        mask = np.any([np.zeros(resolution, dtype=bool), *(region.mask for region in regions)], axis=0)
        if image.label == "anomalous":
            masked, left_out = masked + bool(mask.any()), left_out + (not mask.any())
        if image.label == "normal" or mask.any():
            anomaly_map = enlarged(image.verdict.anomaly_map, resolution)
            pixels.add(anomaly_map, mask)
            if by_region:
                (good if image.label == "normal" else by_defect[image.defect]).add_regions(anomaly_map, regions)
    areas = [area for one in by_defect.values() if (area := (good + one).result().aupro_05) is not None]
    return PixelEvaluation(pixels.result(), resolution, masked, left_out, float(np.mean(areas)) if areas else None)


def enlarged(map_HW: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """A map at `size` = (height, width), as the detector enlarges it."""
    enlarged_YX: NDArray[np.float32] = enlarge(torch.from_numpy(map_HW)[None], size)[0].numpy()
    return enlarged_YX


def read_mask(path: Path, size: tuple[int, int], limits: ImageLimits) -> NDArray[np.bool_]:
    """What a mask, or a folder of masks, marks, at `size` = (height, width): nearest neighbour."""
    marks = [read_marks(read_raw(path.parent / name), limits) for name in mask_files(path.parent, path.name)]
    mask: NDArray[np.bool_] = np.any([resized(one.pixels_YX, size) for one in marks], axis=0)
    return mask


def read_regions(
    raw: Path,
    mask_path: str,
    size: tuple[int, int],
    limits: ImageLimits,
    saturations: Mapping[int, Saturation],
) -> list[SaturatedRegion]:
    """Each mask of an image as a region at `size`; those that mark nothing there are left out.

    A region saturates at the share of its pixels that `saturations` says, at the size in which it was drawn; without
    an entry, at all of them.
    """
    regions = []
    for path in mask_files(raw, mask_path):
        marks = read_marks(read_raw(raw / path), limits)
        drawn, mask_YX = int(marks.pixels_YX.sum()), resized(marks.pixels_YX, size)
        if mask_YX.any():
            one = saturations.get(marks.level, WHOLE)
            share = saturation_area(drawn, one.threshold, one.relative) / drawn
            regions.append(SaturatedRegion(mask_YX, share * float(mask_YX.sum())))
    return regions


def resized(mask_YX: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask at `size` = (height, width): nearest neighbour."""
    height, width = size
    picture = Image.fromarray(mask_YX.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(picture).astype(bool)


def read_raw(path: Path) -> bytes:
    """A file of the raw data; `WTFlowError` when the manifest lists it and it is gone."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise WTFlowError(f"{path}: not there, though the manifest lists it. Type: dvc checkout") from None
