"""From kept figures to what is said of them: rows, claims, a Markdown table, a picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.product_lines import TILE
from benchmarks.report import Claim, at_least, at_most
from wtflow.errors import WTFlowError

Row = dict[str, Any]
MEANS = (
    "image_auroc", "image_ap", "f1", "fpr", "tpr", "pixel_auroc", "aupro_30", "aupro_05", "threads", "train_seconds",
    "train_cpu_seconds", "backbone_ms", "head_ms", "image_ms", "model_bytes", "train_peak_gib", "peak_gib",
)  # fmt: skip
ALL = "mean"
MEASURED = "wtflow-default"
PRESET_LIMITS = {"wtflow-edge": -0.01, "wtflow-accurate": 0.0}
"""What the small preset may lose and the large one must not, in the mean over the lines."""


def summary(found: Sequence[Row]) -> list[Row]:
    """A row a method and line, means over the seeds; then a row a method, the plain mean of its lines."""
    rows = []
    for method in dict.fromkeys(row["method"] for row in found):
        own = [row for row in found if row["method"] == method]
        lines = list(dict.fromkeys(row["line"] for row in own))
        by_line = [_over_seeds([row for row in own if row["line"] == line]) for line in lines]
        first = {key: by_line[0][key] for key in ("method", "ours", "compared", "budget")}
        rows += [*by_line, first | {"line": ALL, "lines": len(lines)} | _means(by_line)]
    return rows


def _over_seeds(seeds: Sequence[Row]) -> Row:
    aurocs = [row["image_auroc"] for row in seeds]
    inside = [row["fpr_interval"][0] <= row["fpr"] <= row["fpr_interval"][1] for row in seeds]
    return {
        **{key: seeds[0][key] for key in ("method", "line", "ours", "compared", "budget", "fpr_interval")},
        **_means(seeds),
        "image_auroc_by_seed": aurocs,
        "image_auroc_sd": statistics.stdev(aurocs) if len(aurocs) > 1 else None,
        "seeds": len(seeds),
        "fpr_outside": len(inside) - sum(inside),
    }


def _means(rows: Sequence[Row]) -> Row:
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in MEANS}
    return {key: statistics.mean(found) for key, found in values.items() if found}


def claims(rows: Sequence[Row], ours: str = MEASURED) -> list[Claim]:
    """What may be said of the preset `ours` against every peer. Raises if it, or every peer, is not among the rows."""
    of = {(row["method"], row["line"]): row for row in rows}
    peers = list(dict.fromkeys(row["method"] for row in rows if not row["ours"] and row["compared"]))
    if (ours, ALL) not in of or not peers:
        raise WTFlowError(
            f"accuracy: nothing to publish without a kept figure of {ours} by today's code, and of a peer. Type: "
            "make bench NAME=accuracy"
        )
    lines = [line for method, line in of if method == ours and line != ALL]
    if partial := [peer for peer in peers if {line for method, line in of if method == peer} != {*lines, ALL}]:
        raise WTFlowError(
            f"accuracy: {', '.join(partial)} and {ours} were not measured on the same lines, so their means cannot be "
            "compared. Type: make bench NAME=accuracy"
        )
    mean = of[ours, ALL]
    ahead = [of[ours, line]["image_auroc"] - of[peer, line]["image_auroc"] for line in lines for peer in peers]
    best = max(of[peer, ALL]["image_auroc"] for peer in peers)
    made = [
        at_least("mean image AUROC over the lines, less that of the best peer", mean["image_auroc"] - best, 0.02),
        at_least("smallest lead in image AUROC over any peer on any line", min(ahead), 0),
        at_most(
            "time of the head as a share of the backbone's, one image", mean["head_ms"] / mean["backbone_ms"], 0.15
        ),
        at_most(
            "lines and seeds whose share of false alarms lies outside the 95 % interval of the 5 % asked for",
            sum(of[ours, line]["fpr_outside"] for line in lines),
            0,
        ),
    ]
    if ("fastflow", ALL) in of:
        least = min(of[ours, line]["image_auroc"] - of["fastflow", line]["image_auroc"] for line in lines)
        made.append(at_least("image AUROC less FastFlow's, on the line where that is least", least, 0.03))
    for preset, limit in PRESET_LIMITS.items():
        if of.get((preset, ALL), {}).get("lines") == len(lines):
            more = of[preset, ALL]["image_auroc"] - mean["image_auroc"]
            made.append(at_least(f"{preset}: mean image AUROC over the lines, less the default's", more, limit))
    if TILE in lines:
        best = max(of[peer, TILE]["aupro_30"] for peer in peers)
        made.append(at_least(f"{TILE}: AUPRO 0.30, less that of the best peer", of[ours, TILE]["aupro_30"] - best, 0))
    return made


def markdown(rows: Sequence[Row]) -> str:
    """The table for docs/results.md: a row a method, image AUROC by line, then what it costs."""
    lines = list(dict.fromkeys(row["line"] for row in rows if row["line"] != ALL))
    of = {(row["method"], row["line"]): row for row in rows}
    head = [
        "method",
        *lines,
        "mean",
        "AUPRO 0.30",
        "FPR",
        "TPR",
        "backbone + head, ms",
        "model, MB",
        "training, s",
        "allowed",
    ]
    table = [head, ["---"] * len(head)]
    for method in dict.fromkeys(row["method"] for row in rows):
        row = of[method, ALL]
        aurocs = [_auroc(of.get((method, line))) for line in lines]
        mean = f"{row['image_auroc']:.3f}" if row["lines"] == len(lines) else ""
        aupro = f"{row['aupro_30']:.3f}" if "aupro_30" in row else ""
        time = f"{row.get('backbone_ms', 0):.1f} + {row['head_ms']:.1f}"
        costs = [time, f"{row['model_bytes'] / 1e6:.1f}", f"{row['train_cpu_seconds']:.0f}"]
        table.append([method, *aurocs, mean, aupro, f"{row['fpr']:.1%}", f"{row['tpr']:.1%}", *costs, row["budget"]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _auroc(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = "" if row["image_auroc_sd"] is None else f" ± {row['image_auroc_sd']:.3f}"
    return f"{row['image_auroc']:.3f}{spread}"


def picture(rows: Sequence[Row], target: Path) -> None:
    """Mean image AUROC against the time of one image on one thread."""
    import matplotlib as mpl
    import matplotlib.ticker

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    shown = [row for row in rows if row["line"] == ALL]
    for row in shown:
        at = (row["image_ms"], row["image_auroc"])
        colour = "#c1121f" if row["ours"] else "#457b9d"
        axes.scatter(*at, color=colour, marker="D" if row["ours"] else "o", s=45)
        # to the left of the point if another one lies where the name would stand
        near = [other for other in shown if abs(other["image_auroc"] - at[1]) < 0.01]
        crowded = any(1 < other["image_ms"] / at[0] < 2.5 for other in near)
        side, shift = ("right", (-6, 4)) if crowded else ("left", (6, 4))
        axes.annotate(row["method"], at, xytext=shift, textcoords="offset points", fontsize=9, ha=side)
    axes.set_xscale("log")
    axes.margins(x=0.45, y=0.1)
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in (10, 20, 30, 50, 70, 100, 200, 300, 500) if low < tick < high])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
    axes.set_xlabel("milliseconds an image, backbone included (one thread)")
    axes.set_ylabel("image AUROC, mean of the lines")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, metadata={"Software": None})
