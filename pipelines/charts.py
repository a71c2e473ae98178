"""The report's charts as PNG bytes: equal numbers give equal bytes, whatever matplotlib's settings are."""

from collections.abc import Mapping
from io import BytesIO

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from wtflow.scoring.metrics import roc

LABEL_COLOURS = {"normal": "#33658a", "anomalous": "#b3261e", "uncertain": "#b7791f"}
INK, FAINT = "#1f2933", "#d8dee6"
STYLE = {
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
BINS = 48
HEIGHT = 4.35
"""Inches, of a histogram of several labels and of the ROC curve beside it. Their widths are 3 : 2, as the report's
columns."""
HEAVY_TAIL = 8.0  # largest score over median score from which on a logarithmic axis shows more


def histogram(scores: Mapping[str, NDArray[np.float64]], threshold: float) -> bytes:
    """Scores [N] by label, one panel a label over a common axis, with the threshold through all of them."""
    shown = {label: values for label, values in scores.items() if len(values)}
    everything = np.concatenate([*shown.values(), [threshold]])
    logarithmic = bool(everything.min() > 0 and everything.max() > HEAVY_TAIL * np.median(everything))
    low, high = everything.min(), max(everything.max(), np.nextafter(everything.min(), np.inf))
    edges = (np.geomspace if logarithmic else np.linspace)(low, high, BINS + 1)
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(6.3, HEIGHT if len(shown) > 1 else 1.85), layout="constrained")
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for panel, (label, values) in zip(panels, shown.items(), strict=True):
            _histogram_panel(panel, label, values, edges, threshold)
        if logarithmic:
            panels[-1].set_xscale("log")
        panels[-1].set_xlabel("anomaly score" + (" (logarithmic axis)" if logarithmic else ""))
        return _png(figure)


def _histogram_panel(
    panel: Axes, label: str, values: NDArray[np.float64], edges: NDArray[np.float64], threshold: float
) -> None:
    colour, above = LABEL_COLOURS[label], int((values > threshold).sum())
    panel.hist(values, bins=edges.tolist(), color=colour, alpha=0.85)
    panel.axvline(threshold, color=INK, linewidth=1.2, linestyle="--")
    panel.set_title(f"{len(values)} {label}: {len(values) - above} pass, {above} flagged", color=colour)
    panel.set_ylabel("images")
    panel.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def roc_curve(
    normal: NDArray[np.float64], anomalous: NDArray[np.float64], point: tuple[float, float], target_fpr: float
) -> bytes:
    """TPR over FPR, with `point` = (FPR, TPR) at the threshold in use and the FPR that was asked for."""
    fpr, tpr = roc(normal, anomalous)
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(4.2, HEIGHT), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
        axes.axvline(
            target_fpr,
            color=INK,
            linewidth=1,
            linestyle=":",
            label=f"false alarms asked for: {target_fpr:.1%}",
        )
        axes.plot(fpr, tpr, color=LABEL_COLOURS["normal"], linewidth=2)
        axes.plot(
            *point,
            "o",
            color=LABEL_COLOURS["anomalous"],
            markersize=8,
            label=f"at the threshold: {point[1]:.1%} found",
        )
        axes.set(xlim=(-0.01, 1), ylim=(0, 1.01), xlabel="normal images flagged", ylabel="anomalous images found")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend(loc="lower right")
        return _png(figure)


def _png(figure: Figure) -> bytes:
    """No date, no version of matplotlib among the metadata."""
    buffer = BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
