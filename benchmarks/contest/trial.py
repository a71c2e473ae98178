"""A method on a line with a seed: asked once, kept for ever, under a key of everything that decides the figures.

job.json --a process (contender.py)--> scores, maps --> figures --> .wtflow/bench/accuracy/<method>-<line>-...json
"""

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from scipy.stats import betabinom

from benchmarks.contest.pictures import rows_of, split_digest, write_pictures
from benchmarks.product_lines import PLACE, PROJECT, ProductLine
from pipelines.evaluation import read_mask
from wtflow.artefact import digest_of, read_json, write_json
from wtflow.data.images import ImageLimits
from wtflow.errors import WTFlowError
from wtflow.scoring.calibration import conformal_rank
from wtflow.scoring.metrics import PixelMetrics, auroc, average_precision

KEPT = PLACE / "accuracy"
TARGET_FPR = 0.05
PEERS_PYTHON = "WTFLOW_PEERS_PYTHON"
PEER_LEVELS = (2, 3)
"""Strides 8 and 16, as WT-Flow has them; PatchCore takes these from a ResNet, PaDiM and FastFlow also stride 4."""
SHARED_CODE = (
    "benchmarks/contest/contender.py",
    "benchmarks/contest/trial.py",
    "pipelines/evaluation.py",
    "wtflow/data/images.py",
    "wtflow/data/masks.py",
    "wtflow/features/backbone.py",
    "wtflow/features/lean.py",
    "wtflow/scoring/anomaly_map.py",
    "wtflow/scoring/calibration.py",
    "wtflow/scoring/histogram.py",
    "wtflow/scoring/metrics.py",
)
"""Source files that decide the figures of every method."""
KEPT_BY_MALLOC = 256 * 2**20


@dataclass(frozen=True)
class Method:
    """A row of the table before it is measured."""

    name: str
    module: str
    """With `build`: see `contender.py`."""
    settings: dict[str, Any]
    budget: str
    """What it was allowed to learn, and where it departs from its paper; stands in the row."""
    anomalib: bool = True
    """Runs with the interpreter that has the peers' packages."""
    ours: bool = False
    """WT-Flow itself, not one of those it is compared with."""
    seeds: Sequence[int] = (0, 1, 2)
    """One is enough where every seed gives the same."""
    compared: bool = True
    """False: in the table, but no claim is made against it."""
    code: Sequence[str] = field(default=())
    """Further source files that decide its figures, from the project's root."""


def kept(method: Method, line: ProductLine, seed: int) -> Path:
    """Where the figures are, once they are measured."""
    return KEPT / f"{method.name}-{line.name}-{seed}-{key(method, line, seed)[:12]}.json"


def measure(method: Method, line: ProductLine, seed: int) -> dict[str, Any]:
    """The kept figures, measured now if they are not there yet."""
    path = kept(method, line, seed)
    if not path.exists():
        write_json(path, _measured(method, line, seed))
    found: dict[str, Any] = read_json(path)
    return found


def key(method: Method, line: ProductLine, seed: int) -> str:
    """Digest of method, settings, code, torch, backbone, split and seed. Comments and docstrings do not count."""
    backbone = {name: _backbone(method, line)[name] for name in ("name", "sha256", "levels", "image_size", "mirrored")}
    sources = [f"{method.module.replace('.', '/')}.py", *method.code, *SHARED_CODE]
    return digest_of(
        {
            "method": [method.name, method.module, method.settings],
            "code": {source: _code(PROJECT / source) for source in sources},
            "packages": [f"torch=={torch.__version__}", *(_pins() if method.anomalib else [])],
            "backbone": backbone,
            "split": split_digest(line),
            "seed": seed,
        }
    )


def _backbone(method: Method, line: ProductLine) -> dict[str, Any]:
    """The line's, for a peer with the levels that it is made for."""
    values = line.extract_params.backbone.model_dump(mode="json")
    return values | {"levels": list(PEER_LEVELS)} if method.anomalib else values


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return digest_of(ast.dump(tree))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _pins() -> list[str]:
    lines = (PROJECT / "infra/peers.lock").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith(("anomalib==", "freia=="))]


def _measured(method: Method, line: ProductLine, seed: int) -> dict[str, Any]:
    KEPT.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=KEPT, prefix="running-") as name:
        folder = Path(name)
        job = {
            "module": method.module,
            "settings": method.settings,
            "seed": seed,
            "pictures": str(write_pictures(line)),
            "fit": str(line.features("fit")),
            "backbone": _backbone(method, line),
            "maps": any(row["mask_path"] for row in rows_of(line, "test")),
        }
        write_json(folder / "job.json", job)
        command = [_interpreter(method), "-W", "ignore", "-m", "benchmarks.contest.contender", str(folder)]
        done = subprocess.run(command, cwd=PROJECT, env=_environment())
        if done.returncode:
            raise WTFlowError(f"{method.name} on {line.name}, seed {seed}: ended with {done.returncode}; see above.")
        return {
            "method": method.name,
            "line": line.name,
            "seed": seed,
            **_figures(line, load_file(folder / "calibrate.safetensors"), load_file(folder / "test.safetensors")),
            **read_json(folder / "facts.json"),
        }


def _environment() -> dict[str, str]:
    """Ours, with a smaller limit for what malloc keeps: PatchCore's buffers of 0.5 GB would pile up to 13 GB."""
    limits = {name: str(KEPT_BY_MALLOC) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
    return os.environ | limits | {"PYTHONPATH": str(PROJECT)}


def _interpreter(method: Method) -> str:
    if not method.anomalib:
        return sys.executable
    python = os.environ.get(PEERS_PYTHON)
    if not python:
        raise WTFlowError(f"{PEERS_PYTHON} is not set: {method.name} needs the peers' environment. Type: make peers")
    return python


def _figures(line: ProductLine, calibrate: dict[str, Any], test: dict[str, Any]) -> dict[str, Any]:
    """The same for all: raw scores, the conformal threshold of the calibration normals, masks at the maps' size."""
    rows, scores = rows_of(line, "test"), test["scores"]
    if not np.isfinite(calibrate["scores"]).all() or len(rows) != len(scores):
        raise WTFlowError(f"{line.name}: {len(scores)} scores for {len(rows)} test images, or one that is not finite.")
    bad = np.array([row["label"] == "anomalous" for row in rows])
    count = len(calibrate["scores"])
    rank = conformal_rank(count, TARGET_FPR)
    flagged = scores > np.sort(calibrate["scores"])[rank - 1]
    hits, false = int((flagged & bad).sum()), int((flagged & ~bad).sum())
    # given exchangeable normals, the flagged ones among n are beta-binomial
    low, high = betabinom.interval(0.95, (~bad).sum(), count + 1 - rank, rank)
    return {
        "image_auroc": auroc(scores[~bad], scores[bad]),
        "image_ap": average_precision(scores[~bad], scores[bad]),
        "f1": 2 * hits / (hits + false + int(bad.sum())),
        "fpr": false / int((~bad).sum()),
        "fpr_interval": [low / int((~bad).sum()), high / int((~bad).sum())],
        "tpr": hits / int(bad.sum()),
        **(_pixel_figures(rows, test["maps"], line.raw, line.prepare_params.limits) if "maps" in test else {}),
    }


def _pixel_figures(rows: list[dict[str, Any]], maps_NYX: Any, raw: Path, limits: ImageLimits) -> dict[str, Any]:
    """Normal images, and anomalous ones whose mask marks something, as `pipelines.evaluation` does."""
    pixels, size = PixelMetrics(), maps_NYX.shape[1:]
    for row, map_YX in zip(rows, maps_NYX, strict=True):
        mask = read_mask(raw / row["mask_path"], size, limits) if row["mask_path"] else np.zeros(size, bool)
        if row["label"] == "normal" or mask.any():
            pixels.add(map_YX, mask)
    return asdict(pixels.result())
