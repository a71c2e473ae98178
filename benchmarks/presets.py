"""What each preset costs: parameters, operations, bytes, memory, time. Measured with untrained weights.

`wtflow inspect` of an untrained bundle, in a process of its own. The largest needs about 11 GB of memory and 7 GB of
disk; a network whose weights would come from the hub gets random ones.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from benchmarks.report import parse_no_arguments, publish
from pipelines.lines import read_params
from pipelines.preset import read_presets
from wtflow.artefact import save_tensors, sha256_file
from wtflow.bundle import BundleConfig, write_bundle
from wtflow.data.images import ImageLimits
from wtflow.detector import Scorer
from wtflow.features.backbone import BackboneParams, build_backbone
from wtflow.features.extract import ExtractParams
from wtflow.features.fusion import build_fusion
from wtflow.flow.velocity import build_field
from wtflow.params import merged
from wtflow.scoring.calibration import Calibration
from wtflow.training import TrainParams


def main() -> None:
    """A row a preset."""
    parse_no_arguments(__doc__ or "", "make bench NAME=presets")
    publish("presets", [row(name) for name in read_presets()], [])


def row(name: str) -> dict[str, Any]:
    """Build the bundle in one process and look at it in another, whose memory is then that of a scoring process."""
    with tempfile.TemporaryDirectory(prefix="wtflow-preset-") as folder:
        bundle = f"{folder}/bundle"
        build = f"from benchmarks.presets import write_untrained; write_untrained({name!r}, {bundle!r})"
        subprocess.run([sys.executable, "-c", build], check=True)
        inspect = [sys.executable, "-m", "wtflow.cli", "inspect", bundle, "--json"]
        with subprocess.Popen(inspect, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            facts = json.load(process.stdout)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "preset": name,
        "map": " x ".join(str(side) for side in facts["settings"]["map_size"]),
        "backbone_parameters": facts["parameters"]["backbone"],
        "field_parameters": facts["parameters"]["field"],
        "backbone_gmac": facts["gmac_per_image"]["backbone"],
        "head_gmac": facts["gmac_per_image"]["head"],
        "bundle_mb": facts["bytes"] / 1e6,
        "peak_memory_gb": usage.ru_maxrss * 1024 / 1e9,
        "backbone_ms": facts["latency_ms"]["backbone"],
        "head_ms": facts["latency_ms"]["head"],
        "backbone_cpu_ms": facts["cpu_ms"]["backbone"],
        "head_cpu_ms": facts["cpu_ms"]["head"],
    }


def write_untrained(name: str, path: str) -> None:
    """A bundle with the shapes of the preset."""
    params, preset = read_params(), read_presets()[name]
    extract = ExtractParams.parse(merged(params["extract"], preset.get("extract", {})), f"presets/{name}.yaml")
    train = TrainParams.parse(merged(params["train"], preset.get("train", {})), f"presets/{name}.yaml")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        backbone = build_backbone(at_hand(extract.backbone, Path(folder)))
    image_BYX3 = torch.zeros(1, *extract.backbone.image_size, 3, dtype=torch.uint8)
    fusion = build_fusion(train.fusion, backbone(image_BYX3), extract.backbone.image_size)
    field = build_field(train.velocity, fusion.channels, fusion.size)
    scorer = Scorer(fusion, field, train.coupling, train.solver, train.score)
    scorer.c.fill_(0.0)
    config = BundleConfig(
        backbone=extract.backbone,
        fusion=train.fusion,
        inputs=fusion.inputs,
        map_size=fusion.size,
        coupling=train.coupling,
        velocity=train.velocity,
        solver=train.solver,
        score=train.score,
        limits=ImageLimits(),
    )
    calibration = Calibration(np.linspace(1.0, 2.0, 100), train.calibration.target_fpr, pixel_threshold=1.0)
    write_bundle(Path(path), config, backbone.network.state_dict(), scorer, calibration, {"line": f"untrained-{name}"})


def at_hand(params: BackboneParams, folder: Path) -> BackboneParams:
    """The same network, with random weights in `folder` where it wants those of the hub."""
    if not params.weights.startswith("hub"):
        return params
    weights = folder / "random.safetensors"
    save_tensors(weights, timm.create_model(params.name).state_dict())
    return params.model_copy(update={"weights": str(weights), "sha256": sha256_file(weights)})


if __name__ == "__main__":
    main()
