"""Stage `prepare`: raw images become a manifest, sorted into train, calibrate and test.

data/raw/<line>/ -> data/prepared/<line>/{manifest,rejected,findings}.parquet, and tables of counts
"""

from collections import Counter
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.environment import RunSettings, progress
from pipelines.lines import line_params
from pipelines.stage import run
from wtflow.data.manifest import PrepareParams, write_findings, write_rejected
from wtflow.data.prepare import Prepared, prepare

LABELS = ("normal", "anomalous", "uncertain")


def main(line: str) -> None:
    """Sort the raw images of `line` into splits and write the tables."""
    params = line_params(line, "prepare", PrepareParams)
    prepared = _prepare_with_bar(Path("data/raw") / line, line, params)
    folder = Path("data/prepared") / line
    prepared.manifest.write(folder / "manifest.parquet")
    write_rejected(prepared.rejected, folder / "rejected.parquet")
    write_findings(prepared.findings, folder / "findings.parquet")
    Console().print(*_tables(prepared), sep="\n")


def _prepare_with_bar(raw: Path, line: str, params: PrepareParams) -> Prepared:
    with progress(f"prepare {line}", total=0) as bar:
        task = bar.task_ids[0]
        looks = RunSettings().work / "looks" / line
        return prepare(raw, line, params, lambda done, total: bar.update(task, completed=done, total=total), looks)


def _tables(prepared: Prepared) -> list[Table]:
    rows = prepared.manifest.rows()
    counts = Counter((row["split"], row["label"]) for row in rows)
    splits = Table("split", *LABELS, "groups", title=f"{prepared.manifest.line}: {len(rows)} images")
    for split in ("train", "calibrate", "test"):
        groups = {row["group"] for row in rows if row["split"] == split and row["label"] == "normal"}
        splits.add_row(split, *(str(counts[split, label]) for label in LABELS), str(len(groups)))
    least = 1 / (counts["calibrate", "normal"] + 1)
    splits.caption = f"so many to calibrate allow a train.calibration.target_fpr of {least:.1%} or more"
    return [
        splits,
        *_counts(prepared.rejected, "reason", "rejected for"),
        *_counts(prepared.findings, "finding", "used, but look at"),
    ]


def _counts(table: pa.Table, column: str, title: str) -> list[Table]:
    """How many images of each kind, and the first one; nothing if there is none."""
    rows = table.to_pylist()
    counts = Table(title, "images", "for example", "what")
    for kind, count in Counter(row[column] for row in rows).most_common():
        first = next(row for row in rows if row[column] == kind)
        counts.add_row(kind, str(count), *(Text(first[name], overflow="fold") for name in ("path", "detail")))
    return [counts] if rows else []


if __name__ == "__main__":
    run(main, __doc__, "python -m pipelines.prepare solar-mono")
