"""A trained line as a folder that needs nothing else: settings, weights, calibration, provenance.

    bundle.json            format, SHA-256 of every other file, and the digest over them
    config.json            settings of backbone, fusion, field, coupling, score; image limits
    backbone.safetensors   the stages of the backbone that are run
    scorer.safetensors     field, channel statistics, constant of the coupling, second moments of y
    calibration.json       scores of the calibration normals, target rate, thresholds
    provenance.json        line, seed, code commit, digests of data and features, versions

The digest names the bundle everywhere: in metrics, registry, service replies. Every file is checked on load, and again
when it is read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from wtflow.artefact import digest_of, read_json, replacing, save_tensors, sha256_bytes, sha256_file, write_json
from wtflow.data.images import ImageLimits
from wtflow.detector import Detector, Scorer
from wtflow.errors import DigestError, WTFlowError
from wtflow.features.backbone import BackboneParams, build_backbone
from wtflow.features.fusion import Fusion, FusionParams
from wtflow.flow.coupling import CouplingParams
from wtflow.flow.solver import SolverParams
from wtflow.flow.velocity import VelocityParams, build_field
from wtflow.params import Section
from wtflow.scoring.calibration import Calibration
from wtflow.scoring.density import ScoreParams

FORMAT = 5
WEIGHTS = ("backbone.safetensors", "scorer.safetensors")
FILES = ("config.json", *WEIGHTS, "calibration.json", "provenance.json")


class BundleConfig(Section):
    """What is needed to build the networks that the weights fit."""

    backbone: BackboneParams
    fusion: FusionParams
    inputs: int
    """D: channels of the fused levels, before they are normalised."""
    map_size: tuple[int, int]
    """H, W of the feature map."""
    coupling: CouplingParams
    velocity: VelocityParams
    solver: SolverParams
    score: ScoreParams
    limits: ImageLimits


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files were checked."""

    path: Path
    digest: str
    config: BundleConfig = field(repr=False)
    calibration: Calibration
    provenance: dict[str, Any] = field(repr=False)
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    """SHA-256 of each file when it was checked."""

    def detector(self) -> Detector:
        """Networks with their weights, in evaluation mode. Raises `DigestError` if the weights are no longer those that
        were checked."""
        config = self.config
        # both before the networks are built, which takes seconds; popped, so that large ones do not stay in memory
        weights = {name: load(_still(self.path, name, self.files)) for name in WEIGHTS}
        backbone = build_backbone(config.backbone, weights.pop("backbone.safetensors"))
        fusion = Fusion(config.fusion, config.inputs, config.map_size)
        network = build_field(config.velocity, fusion.channels, config.map_size)
        scorer = Scorer(fusion, network, config.coupling, config.solver, config.score)
        scorer.load_state_dict(weights.pop("scorer.safetensors"))
        return Detector(backbone, scorer.freeze(), self.calibration, config.limits)


def write_bundle(
    path: Path,
    config: BundleConfig,
    backbone: Mapping[str, Tensor],
    scorer: Scorer,
    calibration: Calibration,
    provenance: dict[str, Any],
) -> str:
    """Write the folder as a whole, replacing what was there; returns its digest. `backbone`: the weights that are run,
    as `Backbone.network` holds them and the features carry them."""
    with replacing(path) as draft:
        draft.mkdir(parents=True)
        write_json(draft / "config.json", config.model_dump(mode="json"))
        save_tensors(draft / "backbone.safetensors", backbone)
        save_tensors(draft / "scorer.safetensors", scorer.state_dict())
        write_json(draft / "calibration.json", calibration.to_json())
        write_json(draft / "provenance.json", provenance)
        files = {name: sha256_file(draft / name) for name in FILES}
        digest = digest_of(files)
        write_json(draft / "bundle.json", {"format": FORMAT, "files": files, "digest": digest})
    return digest


def load_bundle(path: Path) -> Bundle:
    """Open a bundle, every file's SHA-256 compared with the recorded one.

    Raises `DigestError` for a changed, missing or added file and `WTFlowError` for an unknown format.
    """
    if not (path / "bundle.json").is_file():
        below = ", ".join(str(found.parent) for found in sorted(path.glob("*/bundle.json")))
        remedy = (
            f"Bundles below it: {below}" if below else "Type: dvc repro train@<line>, whose bundle is models/<line>."
        )
        raise WTFlowError(f"{path / 'bundle.json'}: not there, so this is no bundle. {remedy}")
    header = read_json(path / "bundle.json")
    if not isinstance(header, dict):
        raise DigestError(f"{path / 'bundle.json'}: not the header of a bundle. Fetch the bundle again.")
    if header.get("format") != FORMAT:
        raise WTFlowError(
            f"{path / 'bundle.json'}: format {header.get('format')}, this version reads {FORMAT}. Train the line again."
        )
    if set(header) != {"format", "files", "digest"} or not isinstance(header["files"], dict):
        raise DigestError(f"{path / 'bundle.json'}: holds {sorted(header)}. Fetch the bundle again.")
    found = {file.name for file in path.iterdir()} - {"bundle.json"}
    if extra := found - set(FILES):
        raise DigestError(f"{path}: {', '.join(sorted(extra))} does not belong into a bundle. Remove it.")
    if found != set(FILES) or set(header["files"]) != set(FILES):
        lacking = set(FILES) - (found & set(header["files"]))
        raise DigestError(
            f"{path}: this bundle lacks {', '.join(sorted(lacking)) or 'a file'}. Fetch it again from the registry."
        )
    for name, digest in header["files"].items():
        if sha256_file(path / name) != digest:
            raise DigestError(
                f"{path / name}: not the bytes that were written. Fetch the bundle again, or train the line again."
            )
    if digest_of(header["files"]) != header["digest"]:
        raise DigestError(f"{path / 'bundle.json'}: its digest does not fit its files. Fetch the bundle again.")
    config, calibration, provenance = (
        json.loads(_still(path, name, header["files"]))
        for name in ("config.json", "calibration.json", "provenance.json")
    )
    return Bundle(
        path,
        header["digest"],
        BundleConfig.parse(config, str(path / "config.json")),
        Calibration.from_json(calibration),
        provenance,
        header["files"],
    )


def _still(path: Path, name: str, files: Mapping[str, str]) -> bytes:
    """The bytes of a file that was checked. Raises `DigestError` if it has become another one: a stage that trains the
    line again replaces the whole folder, at any time."""
    try:
        data = (path / name).read_bytes()
    except FileNotFoundError:  # between the two renames of a replacement
        data = b""
    if sha256_bytes(data) != files[name]:
        raise DigestError(f"{path / name}: the bundle was replaced while it was opened. Type the command again.")
    return data
