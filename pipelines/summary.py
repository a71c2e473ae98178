"""What `make repro` ends with: a row a line, from the metrics and the registry."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.adapters import mlflow_registry as models
from pipelines.adapters.tracking import tracking, tracking_uri
from pipelines.lines import read_params
from wtflow.artefact import read_json
from wtflow.errors import WTFlowError

COLUMNS = (
    "line",
    "image AUROC",
    "threshold",
    "FPR (target)",
    "TPR",
    "bundle",
    "version",
    "aliases",
    "report",
)


def main() -> None:
    """Print the table of all lines that have been evaluated."""
    table = Table(title="WT-Flow")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    lines = list(read_params()["lines"])
    with tracking() as (client, _):
        for line in lines:
            if Path(f"metrics/{line}.json").exists():
                table.add_row(*_row(client, line, read_json(Path(f"metrics/{line}.json"))))
            else:
                table.add_row(line, *[""] * (len(COLUMNS) - 2), f"not evaluated: dvc repro register@{line}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(f"MLflow: {tracking_uri()}   Score over HTTP: make serve", highlight=False)


def _row(client: Any, line: str, metrics: dict[str, Any]) -> list[str]:
    version, aliases = models.version_of(client, line, metrics["bundle_digest"]), models.aliases(client, line)
    names = [alias for alias, number in aliases.items() if version and number == version.version]
    if models.CHAMPION not in names and models.CHAMPION in aliases:
        names.append(f"(served: version {aliases[models.CHAMPION]})")
    return [
        line,
        _figure(metrics["image_auroc"]),
        _figure(metrics["threshold"]),
        f"{_figure(metrics['fpr'], 3)} ({metrics['target_fpr']:g})",
        _figure(metrics["tpr"], 3),
        metrics["bundle_digest"][:12],
        str(version.version) if version else f"none: dvc repro --force --single-item register@{line}",
        ", ".join(sorted(names)),
        f"reports/{line}/index.html",
    ]


def _figure(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m pipelines.summary", description=__doc__).parse_args()
    try:
        main()
    except WTFlowError as error:
        sys.exit(f"error: {error}")
