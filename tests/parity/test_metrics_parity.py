"""Pixel figures against those of anomalib and pyaupro, which run in an environment of their own.

WTFLOW_PEERS_PYTHON names its interpreter; `make peers` makes it.
"""

import json
import os
import subprocess
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from benchmarks.metrics import pixels
from wtflow.scoring.metrics import PixelMetrics

PEERS = os.environ.get("WTFLOW_PEERS_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PEERS, reason="WTFLOW_PEERS_PYTHON is not set: an interpreter that has anomalib and pyaupro"
    ),
]
ORACLE = """
import json, sys
import numpy as np, torch
from anomalib.metrics.aupro import _AUPRO
from pyaupro import PerRegionOverlap
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

data = np.load(sys.argv[1])
maps, masks = torch.from_numpy(data["maps"]), torch.from_numpy(data["masks"]).int()

def anomalib(limit):
    metric = _AUPRO(fpr_limit=limit)
    metric.update(maps, masks)
    return float(metric.compute())

def pyaupro(limit):
    metric = PerRegionOverlap(thresholds=None, reference_implementation=True)
    metric.update(maps, masks)
    fpr, pro = (np.asarray(part, dtype=np.float64) for part in metric.compute())
    order = np.argsort(fpr, kind="stable")
    fpr, pro = fpr[order], np.sort(pro)
    inside = fpr <= limit
    x, y = np.append(fpr[inside], limit), np.append(pro[inside], np.interp(limit, fpr, pro))
    return float(np.trapezoid(y, x)) / limit

print(json.dumps({
    "pixel_auroc": float(binary_auroc(maps.ravel(), masks.ravel())),
    "pixel_ap": float(binary_average_precision(maps.ravel(), masks.ravel())),
    "anomalib": [anomalib(limit) for limit in (0.30, 0.05)],
    "pyaupro": [pyaupro(limit) for limit in (0.30, 0.05)],
}))
"""


@pytest.mark.parametrize("ties", [False, True])
def test_pixel_figures_are_those_of_the_peers(tmp_path: Path, ties: bool) -> None:
    """Scores in [0, 1], which both peers leave as they are; smooth ones, and ones of 50 levels."""
    images = [(1 - np.exp(-scores), mask) for scores, mask in pixels(8, 0.5)]
    if ties:
        images = [(np.round(50 * scores) / np.float32(50), mask) for scores, mask in images]
    np.savez(tmp_path / "images.npz", maps=[scores for scores, _ in images], masks=[mask for _, mask in images])
    metrics = PixelMetrics()
    for scores, mask in images:
        metrics.add(scores, mask)
    command = [str(PEERS), "-c", ORACLE, str(tmp_path / "images.npz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    pixel_auroc, pixel_ap, *aupro = astuple(metrics.result())
    assert pixel_auroc == pytest.approx(theirs["pixel_auroc"], abs=1e-5)
    assert pixel_ap == pytest.approx(theirs["pixel_ap"], abs=1e-5)
    assert aupro == pytest.approx(theirs["pyaupro"], abs=1e-5)
    assert aupro == pytest.approx(theirs["anomalib"], abs=1e-5)
