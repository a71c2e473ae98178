"""The tables that some data sets bring: CSV in UTF-8, a header line first."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from wtflow.errors import WTFlowError

SEPARATORS = {";": "semicolons", "\t": "tabs"}
"""What a spreadsheet may write in place of commas."""


def rows(
    path: Path, layout: str, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row with where it stands, `file:line`. All `columns` have to be there, others only if they are `optional`;
    an optional one that is missing, or a field that the row leaves out, is empty."""
    also = f" (and may have {', '.join(optional)})" if optional else ""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            found = list(reader.fieldnames or ())
            if set(columns) - set(found) or set(found) - {*columns, *optional} or len(found) > len(set(found)):
                raise WTFlowError(
                    f"{path}: first line has to be {','.join(columns)}{also}, found {found}.{_other_separator(found)}"
                )
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row:
                    raise WTFlowError(f"{where}: more fields than columns. Put a text that has a comma into quotes.")
                yield where, {**dict.fromkeys(optional, ""), **row}
    except FileNotFoundError:
        raise WTFlowError(
            f"{path}: not there, layout {layout} needs it. Type: dvc repro fetch, or name the layout."
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise WTFlowError(f"{path}: not a CSV file in UTF-8 ({error}).") from None


def place_of(column: str, row: Mapping[str, str], where: str, table: str) -> str:
    """The path in a column of `table`, one text for one place: `./a//b.png` is `a/b.png`."""
    place = PurePosixPath(row[column])
    if place.is_absolute() or not place.name or ".." in place.parts:
        raise WTFlowError(
            f"{where}: {column} is {row[column]!r}. Name a path below the folder of {table}, without '..' in it."
        )
    return place.as_posix()


def _other_separator(header: Sequence[str]) -> str:
    """A sentence more, if the whole first line came out as one column because no comma is in it."""
    found = [name for sign, name in SEPARATORS.items() if len(header) == 1 and sign in header[0]]
    return f" It is separated by {found[0]}: use commas." if found else ""
