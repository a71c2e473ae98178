"""The one form of every benchmark: a table on the screen and a JSON file with its circumstances and claims."""

import argparse
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wtflow.artefact import write_json

RESULTS = Path(__file__).parent / "results"
SHOWN = 6
"""Entries of a list in a cell of the table; the file has all of them."""
LIBRARIES = ("torch", "timm", "ray", "mlflow", "dvc", "numpy")


@dataclass(frozen=True)
class Claim:
    """A sentence that the docs may make, with the figure that decides it."""

    claim: str
    value: float
    limit: str
    """What `value` is compared with, e.g. `>= 0.92`."""
    holds: bool


def at_least(claim: str, value: float, limit: float) -> Claim:
    """A claim that holds from `limit` up."""
    return Claim(claim, round(value, 4), f">= {limit:g}", value >= limit)


def at_most(claim: str, value: float, limit: float) -> Claim:
    """A claim that holds up to `limit`."""
    return Claim(claim, round(value, 4), f"<= {limit:g}", value <= limit)


def publish(name: str, rows: Sequence[Mapping[str, Any]], claims: Sequence[Claim], table: bool = True) -> None:
    """Print claims, and rows unless a better table was printed, and write benchmarks/results/<name>.json."""
    console = Console(width=160)
    if table:
        for one in _tables(name, rows):
            console.print(one)
    for claim in claims:
        console.print(
            f"{'holds' if claim.holds else 'FAILS'}: {claim.claim}: {claim.value:g} ({claim.limit})", markup=False
        )
    result = {
        "command": f"make bench NAME={name}",
        "commit": _commit(),
        "machine": _machine(),
        "versions": {"python": platform.python_version()} | {library: version(library) for library in LIBRARIES},
        "rows": list(rows),
        "claims": [asdict(claim) for claim in claims],
    }
    write_json(RESULTS / f"{name}.json", result)
    console.print(f"Written: benchmarks/results/{name}.json")


def _tables(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A new one begins with a row that lacks columns of those before it and has others."""
    groups: list[tuple[list[str], list[Mapping[str, Any]]]] = []
    for row in rows:
        if not groups or not (row.keys() <= set(groups[-1][0]) or row.keys() >= set(groups[-1][0])):
            groups.append(([], []))
        columns, alike = groups[-1]
        columns += [column for column in row if column not in columns]
        alike.append(row)
    tables = []
    for columns, alike in groups:
        table = Table(title=name)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in alike:
            table.add_row(*(_cell(row.get(column)) for column in columns))
        tables.append(table)
    return tables


def parse_no_arguments(description: str, example: str) -> None:
    """`--help` for a benchmark that takes nothing."""
    argparse.ArgumentParser(description=description, epilog=f"example: {example}").parse_args()


def _cell(value: Any) -> str:
    if isinstance(value, list):
        shown = value if len(value) <= SHOWN else [*value[: SHOWN - 1], "...", value[-1]]
        return ", ".join(map(_cell, shown))
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _machine() -> dict[str, Any]:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1), "gpu": None}


def _commit() -> str:
    """Marked if the tree has changes other than results: a benchmark that publishes as it goes writes them itself."""
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", f":(exclude){RESULTS}")
    return _git("rev-parse", "HEAD") + ("+changes" if changes else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
