"""Solar cells: `labels.csv` (columns path, probability, cell) beside the images it names.

Probability of a defect, as experts judged: 0 is normal, 1 anomalous; 1/3 and 2/3 are uncertain. `cell` counts
all cells of the data set from 0, in file order. Neighbours come from one module, so the groups are blocks of
consecutive cells.
"""

from collections.abc import Iterator
from pathlib import Path

from wtflow.data.manifest import Label, PrepareParams
from wtflow.data.sources.source_image import SourceImage
from wtflow.data.sources.table import place_of, rows
from wtflow.errors import WTFlowError

TABLE = "labels.csv"
COLUMNS = ("path", "probability", "cell")
JUDGEMENTS: tuple[tuple[float, Label, str], ...] = (
    (0.0, "normal", ""),
    (1 / 3, "uncertain", "probability 1/3"),
    (2 / 3, "uncertain", "probability 2/3"),
    (1.0, "anomalous", "defective"),
)


def images(raw: Path, params: PrepareParams) -> Iterator[SourceImage]:
    """One image a row of labels.csv. No split of its own, no masks."""
    for where, row in rows(raw / TABLE, "elpv", COLUMNS):
        yield _image(row, where, params)


def _image(row: dict[str, str], where: str, params: PrepareParams) -> SourceImage:
    try:
        probability, cell = float(row["probability"]), int(row["cell"])
    except ValueError:
        raise WTFlowError(f"{where}: probability has to be a number and cell a whole one, found {row}.") from None
    for value, label, defect in JUDGEMENTS:
        if abs(probability - value) < 1e-3 and cell >= 0:
            group = f"block{cell // params.group_block:04d}"
            return SourceImage(place_of("path", row, where, TABLE), group, None, label, defect, None)
    raise WTFlowError(f"{where}: probability has to be 0, 1/3, 2/3 or 1 and cell not below 0, found {row}.")
