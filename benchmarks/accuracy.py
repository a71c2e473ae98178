"""WT-Flow and its peers on the same images, splits, input size and backbone; nothing is chosen on a test image.

Type `make peers` once; `make repro` brings the lines. A (method, line, seed) that was measured is kept in
.wtflow/bench/accuracy and not measured again. --method, --line and --seed measure a part and publish nothing; --kept
measures nothing and publishes what was measured so far: a method that was not is not in the table.
"""

import argparse
from typing import Any

from rich.console import Console

from benchmarks.contest.methods import entrants
from benchmarks.contest.table import claims, markdown, picture, summary
from benchmarks.contest.trial import kept, measure
from benchmarks.product_lines import PROJECT, extract_features, product_lines
from benchmarks.report import publish

SEEDS = (0, 1, 2)
SHOWN = ("image_auroc", "aupro_30", "fpr", "tpr", "image_ms", "train_cpu_seconds", "train_peak_gib")


def main() -> None:
    """Measure what is missing, seed 0 of everything first; without a choice publish table, claims and picture."""
    asked, console = _arguments(), Console(soft_wrap=True, highlight=False)
    lines = [line for line in product_lines() if asked.line in (None, line.name)]
    found: list[dict[str, Any]] = []
    for seed in SEEDS:
        for line in lines:
            for method, seen in entrants(line):
                left_out = asked.method not in (None, method.name) or asked.seed not in (None, seed)
                if left_out or seed not in method.seeds:
                    continue
                if not kept(method, seen, seed).exists():
                    if asked.kept:
                        continue
                    if not method.anomalib:
                        extract_features(seen)
                row = measure(method, seen, seed)
                found.append(row | {"budget": method.budget, "ours": method.ours, "compared": method.compared})
                figures = "  ".join(f"{name} {row[name]:.4g}" for name in SHOWN if row.get(name) is not None)
                console.print(f"{method.name}, {line.name}, seed {seed}: {figures}", markup=False)
    rows = summary(found)
    console.print(markdown(rows), markup=False)
    if (asked.method, asked.line, asked.seed) == (None, None, None):
        publish("accuracy", rows, claims(rows), table=False)
        picture(rows, PROJECT / "docs/images/accuracy.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: make bench NAME=accuracy ARGS=--kept")
    parser.add_argument("--method", help="measure this one only")
    parser.add_argument("--line", help="measure this line only")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="measure this seed only")
    parser.add_argument("--kept", action="store_true", help="publish what was measured so far")
    return parser.parse_args()


if __name__ == "__main__":
    main()
