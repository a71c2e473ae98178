"""A claim without a command that checks it, or without its last figure, is not one."""

import json
import re
from pathlib import Path

import pytest

from tests.guards.closure import ROOT

CLAIMS = ROOT / "docs" / "claims.md"
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
COLUMNS = ("claim", "command", "figure", "commit")
COMMAND = re.compile(r"(make|pytest|dvc) \S+")
COMMIT = re.compile(r"[0-9a-f]{7,40}\+?")
NOTHING = {"", "-", "?", "todo", "tbd", "pending"}


def cells(line: str) -> list[str]:
    """Cells of a Markdown table's row; a bar behind a backslash belongs to the text."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def table(text: str) -> list[dict[str, str]]:
    """Rows of every table whose header names the four columns, in any order and with any others between."""
    rows: list[dict[str, str]] = []
    header: dict[str, int] | None = None
    for line in text.splitlines():
        if not line.lstrip().startswith("|"):
            header = None
        elif header is None:
            names = [cell.lower() for cell in cells(line)]
            places = {column: [i for i, name in enumerate(names) if column in name.split()] for column in COLUMNS}
            header = {column: found[0] for column, found in places.items() if found}
        elif set(line.strip()) - set("|-: ") and set(header) == set(COLUMNS):
            values = cells(line)
            rows.append({column: values[at] if at < len(values) else "" for column, at in header.items()})
    return rows


def faults(row: dict[str, str]) -> list[str]:
    """What a row lacks."""
    found = [f"no {column}" for column in COLUMNS if row[column].strip("` ").lower() in NOTHING]
    if not COMMAND.match(row["command"].strip("` ")):
        found.append("its command is not of make, pytest or dvc")
    if not COMMIT.fullmatch(row["commit"].strip("` ")):
        found.append("its commit is not one")
    return found


def test_every_claim_has_a_command_a_figure_and_a_commit() -> None:
    rows = table(CLAIMS.read_text(encoding="utf-8"))
    assert rows, "docs/claims.md: no table with the columns claim, command, figure, commit"
    assert {row["claim"]: faults(row) for row in rows if faults(row)} == {}
    assert len({row["claim"] for row in rows}) == len(rows)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_claim_of_a_benchmark_is_listed_with_what_came_out(path: Path) -> None:
    listed = {row["claim"]: row for row in table(CLAIMS.read_text(encoding="utf-8"))}
    result = json.loads(path.read_text(encoding="utf-8"))
    claims, (commit, _, changes) = result["claims"], result["commit"].partition("+")
    assert {claim["claim"] for claim in claims} - set(listed) == set()
    for claim in claims:
        assert set(claim) == {"claim", "value", "limit", "holds"}
        assert float(listed[claim["claim"]]["figure"].split()[0]) == round(claim["value"], 4), claim
        assert listed[claim["claim"]]["commit"] == commit[:12] + ("+" if changes else ""), claim
        assert ("DOES NOT HOLD" in listed[claim["claim"]]["figure"]) != claim["holds"], claim


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_has_its_benchmark(path: Path) -> None:
    assert (ROOT / "benchmarks" / f"{path.stem}.py").is_file()


def test_the_guard_sees_what_it_should() -> None:
    text = (
        "| claim | command | last figure | commit |\n|---|---|---|---|\n"
        "| a \\| b | `make bench NAME=x` | 0.93 | `0123abc` |\n| c | look at it | - | main |\n\n"
        "| other | table |\n|---|---|\n| x | y |\n"
    )
    good, bad = table(text)
    assert (good["claim"], faults(good)) == ("a | b", [])
    assert faults(bad) == ["no figure", "its command is not of make, pytest or dvc", "its commit is not one"]
