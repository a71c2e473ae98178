"""The tables of `wtflow score` and `drift`, and where the command line prints tables."""

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from wtflow.detector import Verdict
    from wtflow.scoring.calibration import Calibration
    from wtflow.scoring.drift import Batch

WIDTH = 160


def console() -> Console:
    """Standard output; a table that goes to a file or a pipe has `WIDTH` columns."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that it cannot encode
    out = Console()
    return out if out.is_terminal else Console(width=WIDTH)


def verdict_table(verdicts: Sequence[tuple[Path, "Verdict"]]) -> Table:
    """A row a photograph."""
    table = Table(caption=f"anomalous above the threshold, {verdicts[0][1].threshold:.4f}")
    table.add_column("image", overflow="fold")
    for column in ("score", "p-value"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for path, verdict in verdicts:
        word = "anomalous" if verdict.is_anomalous else "review" if verdict.needs_review else "normal"
        style = {"anomalous": "bold red", "review": "yellow", "normal": ""}[word]
        name = Text(str(path))
        table.add_row(name, f"{verdict.score:.4f}", f"{verdict.p_value:.4f}", Text(word, style))
    return table


def drift_table(title: str, found: Sequence["Batch"], calibration: "Calibration", level: float) -> Table:
    """A row a batch of replies."""
    words = {"none": "as calibrated", "higher": "higher: parts look odder", "lower": "lower: parts look more alike"}
    table = Table(
        title=title,
        caption=f"flagged: at most {calibration.target_fpr:.1%} of normals, and the defects; "
        f"tested against {len(calibration.scores)} calibration scores; shifted: p below {level:g}",
    )
    for column in ("replies", "flagged", "95 % interval", "median p-value", "p of the test"):
        table.add_column(column, justify="right")
    table.add_column("scores")
    for one in found:
        low, high = one.flagged_interval
        table.add_row(
            f"{one.first} to {one.first + one.images - 1}",
            f"{one.flagged / one.images:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{one.median_p:.2f}",
            f"{one.p_same:.2g}",
            Text(words[one.shift], "" if one.shift == "none" else "bold red"),
        )
    return table
