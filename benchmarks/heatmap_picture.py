"""The picture at the top of the README: heat maps of real test photographs of solar-mono, without the photographs.

Their licence does not allow us to hand them on; the maps are WT-Flow's own. Run `make repro` first.
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np

from benchmarks.report import parse_no_arguments
from wtflow.bundle import load_bundle
from wtflow.data.shards import FeatureShards
from wtflow.scoring.anomaly_map import heatmap

LINE = "solar-mono"
SIDE = 256
RANKS = {"normal": (0.1, 0.5, 0.9), "anomalous": (0.25, 0.5, 0.9)}
"""Which images: at these ranks of their label's scores, so that neither the best nor the worst are picked."""


def main() -> None:
    """Write docs/images/heatmap.png."""
    parse_no_arguments(__doc__ or "", "python -m benchmarks.heatmap_picture")
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    bundle, test = load_bundle(Path(f"models/{LINE}")), FeatureShards.open(Path(f"data/features/{LINE}/test"))
    detector = bundle.detector()
    figure, axes = plt.subplots(1, 6, figsize=(13, 2.75))
    column = 0
    for label, ranks in RANKS.items():
        rows = test.rows(label=label)
        verdicts = [verdict for levels in test.batches(rows, 32) for verdict in detector.verdicts_of_features(levels)]
        order = np.argsort([verdict.score for verdict in verdicts])
        for rank in ranks:
            verdict = verdicts[order[int(rank * (len(order) - 1))]]
            axes[column].imshow(heatmap(verdict.anomaly_map, (SIDE, SIDE), bundle.calibration.pixel_threshold))
            flag = "anomalous" if verdict.is_anomalous else "normal"
            name = "good cell" if label == "normal" else "defective cell"
            axes[column].set_title(f"{name}\nscore {verdict.score:.2f}, p {verdict.p_value:.2f}: {flag}", fontsize=9)
            axes[column].set_axis_off()
            column += 1
    figure.tight_layout()
    target = Path("docs/images/heatmap.png")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
