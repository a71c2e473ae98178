"""How well the presets detect that change more than the network's shape costs: `edge` and `accurate`, every line, three
seeds, final weights, beside the default's figures of `make bench NAME=accuracy`.

`make repro` brings the lines. What was measured is kept in .wtflow/bench/preset_accuracy. `paper` is left out: its
weights come from a hub and its field wants a GPU.
"""

import argparse
import statistics
from typing import Any

import yaml
from rich.console import Console

from benchmarks.contest.methods import preset
from benchmarks.contest.table import ALL
from benchmarks.contest.trial import key
from benchmarks.product_lines import PLACE, ProductLine, extract_features, image_auroc, product_lines, trained
from benchmarks.report import RESULTS, Claim, at_least, publish
from pipelines.lines import read_params
from pipelines.preset import read_presets, with_preset
from wtflow.artefact import read_json, replacing, write_json

MEASURED = ("edge", "accurate")
SEEDS = (0, 1, 2)
KEPT = PLACE / "preset_accuracy"
MAY_LOSE = 0.01


def main() -> None:
    """Measure what is missing of what was asked for, then publish all there is."""
    asked = _arguments()
    found: dict[str, dict[str, list[float]]] = {}
    for name in MEASURED:
        for line in product_lines():
            with_it = laid_over(line, name)
            wanted = asked.preset in (None, name)
            values = [value for seed in SEEDS if (value := _image_auroc(with_it, name, seed, wanted)) is not None]
            if values:
                found.setdefault(name, {})[line.name] = values
    default = _default()
    rows = [_row("default", default), *(_row(name, lines) for name, lines in found.items())]
    publish("preset_accuracy", rows, claims(rows))


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """What the small one may lose and the large one must not, in the mean over the lines."""
    of = {row["preset"]: row["mean"] for row in rows if "mean" in row}
    limits = {"edge": -MAY_LOSE, "accurate": 0.0}
    return [
        at_least(f"{name}: mean image AUROC over the lines, less the default's", of[name] - of["default"], limit)
        for name, limit in limits.items()
        if name in of
    ]


def laid_over(line: ProductLine, name: str) -> ProductLine:
    """The line with the preset's settings, its features in a workplace of their own."""
    params, place = read_params(line.place / "params.yaml"), PLACE / "presets" / name / line.name
    sections = with_preset(params["lines"][line.name], read_presets(), name)
    with replacing(place / "params.yaml") as draft:
        draft.write_text(yaml.safe_dump({**params, "fetch": {}, "lines": {line.name: sections}}, sort_keys=False))
    line.manifest.write(place / f"data/prepared/{line.name}/manifest.parquet")
    return ProductLine(line.name, place, line.raw)


def _image_auroc(line: ProductLine, name: str, seed: int, wanted: bool) -> float | None:
    path = KEPT / f"{name}-{line.name}-{seed}-{key(preset(name, {}, line), line, seed)[:12]}.json"
    if wanted and not path.exists():
        extract_features(line)
        fit, test = line.shards("fit"), line.shards("test")
        params = line.train_params.model_copy(update={"seed": seed})
        write_json(path, {"image_auroc": image_auroc(trained(fit, params), test)})
        Console().print(f"{name}, {line.name}, seed {seed}: {read_json(path)['image_auroc']:.4f}", highlight=False)
    return read_json(path)["image_auroc"] if path.exists() else None


def _default() -> dict[str, list[float]]:
    rows = read_json(RESULTS / "accuracy.json")["rows"]
    return {
        row["line"]: [row["image_auroc"]] for row in rows if row["method"] == "wtflow-default" and row["line"] != ALL
    }


def _row(name: str, lines: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"preset": name}
    for line, values in lines.items():
        row[line] = statistics.mean(values)
        if len(values) > 1:
            row[f"{line} sd"] = statistics.stdev(values)
    return row | {"mean": statistics.mean(row[line] for line in lines)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: make bench NAME=preset_accuracy")
    parser.add_argument("--preset", choices=MEASURED, help="measure this one only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
