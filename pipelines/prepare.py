"""Stage `prepare`: raw images become a manifest, sorted into train, calibrate and test.

data/raw/<line>/ -> data/prepared/<line>/{manifest,rejected,findings}.parquet, and tables of counts
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.environment import RunSettings, progress
from pipelines.false_alarms import holds, images_needed
from pipelines.lines import line_params
from pipelines.stage import run
from wtflow.data.manifest import PrepareParams, cut_from_train, split_of, write_table
from wtflow.data.prepare import Prepared, prepare
from wtflow.errors import WTFlowError
from wtflow.params import Section
from wtflow.scoring.calibration import CalibrationParams

LABELS = ("normal", "anomalous", "uncertain")


class AskedOfTrain(Section):
    """What of `train` says how many calibration images it needs. For display alone: nothing that this stage writes
    depends on it, so dvc.yaml does not name it among the params."""

    model_config = ConfigDict(extra="ignore")

    calibration: CalibrationParams


def main(line: str) -> None:
    """Sort the raw images of `line` into splits and write the tables."""
    params = line_params(line, "prepare", PrepareParams)
    prepared = _prepare_with_bar(Path("data/raw") / line, line, params)
    folder = Path("data/prepared") / line
    prepared.manifest.write(folder / "manifest.parquet")
    write_table(prepared.rejected, folder / "rejected.parquet")
    write_table(prepared.findings, folder / "findings.parquet")
    Console().print(*_tables(prepared), sep="\n")
    if warning := _too_few_to_calibrate(prepared, params):
        Console().print(Text(warning, style="bold red"), soft_wrap=True)


def _prepare_with_bar(raw: Path, line: str, params: PrepareParams) -> Prepared:
    with progress(f"prepare {line}", total=0) as bar:
        task = bar.task_ids[0]
        looks = RunSettings().work / "looks" / line
        return prepare(raw, line, params, lambda done, total: bar.update(task, completed=done, total=total), looks)


def _too_few_to_calibrate(prepared: Prepared, params: PrepareParams) -> str | None:
    """That training will stop for want of calibration images, and the remedies; None if it has enough."""
    line, rate = prepared.manifest.line, _asked_rate(prepared.manifest.line)
    counts = Counter(row["split"] for row in _normals(prepared))
    images = counts["calibrate"]
    if rate is None or holds(images, rate):
        return None
    remedy = f"Bring more normal images ({images + counts['train']} are outside test)"
    if found := enough_to_calibrate(prepared, params, rate):
        fraction, then = found
        remedy = (
            f"Raise prepare.calibrate_fraction to {fraction:g}, which leaves {then['calibrate']} to calibrate "
            f"and {then['train']} to train"
        )
    return (
        f"{line}: training will stop: there are {images} of the {images_needed(rate)} calibration images that a rate "
        f"of {100 * rate:g} % needs. {remedy}, or ask for a higher rate (train.calibration.target_fpr)."
    )


def _asked_rate(line: str) -> float | None:
    """The false-alarm rate that `train` will be asked for; None if its section is wrong, which `train` will say."""
    try:
        return line_params(line, "train", AskedOfTrain).calibration.target_fpr
    except WTFlowError:
        return None


def enough_to_calibrate(prepared: Prepared, params: PrepareParams, rate: float) -> tuple[float, Counter[str]] | None:
    """The least `calibrate_fraction`, to 0.01, whose calibration images hold `rate`, and the normals a split then.

    None if none leaves an image to train, and where the data set itself says which images calibrate.
    """
    normals = _normals(prepared)
    for draw, rows in ((split_of, normals), (cut_from_train, [row for row in normals if row["split"] != "test"])):
        if any(draw(row["group"], params) != row["split"] for row in rows):
            continue
        for percent in range(int(100 * params.calibrate_fraction), math.ceil(100 * (1 - params.test_fraction))):
            tried = params.model_copy(update={"calibrate_fraction": percent / 100})
            counts = Counter(draw(row["group"], tried) for row in rows)
            if counts["train"] and holds(counts["calibrate"], rate):
                return percent / 100, Counter(counts)
    return None


def _normals(prepared: Prepared) -> list[dict[str, Any]]:
    return [row for row in prepared.manifest.rows() if row["label"] == "normal"]


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
