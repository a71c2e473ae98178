"""evaluate: a line's bundle on its test split -> metrics, a row an image, and a report with pictures.

models/<line>/ + data/features/<line>/test/ + data/raw/<line>/
-> metrics/<line>.json, evaluations/<line>/per_image.parquet, reports/<line>/index.html
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from rich.console import Console

from pipelines import stage
from pipelines.environment import RunSettings
from pipelines.evaluation import Evaluation, ScoredImage, evaluate
from pipelines.lines import line_params
from pipelines.report import figure, percent, report
from wtflow.artefact import replacing, write_json
from wtflow.bundle import load_bundle
from wtflow.data.shards import FeatureShards
from wtflow.params import Section

PER_IMAGE_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("label", pa.string()),
        ("defect", pa.string()),
        ("score", pa.float64()),
        ("p_value", pa.float64()),
        ("is_anomalous", pa.bool_()),
        ("needs_review", pa.bool_()),
    ]
)
Pixels = Annotated[int, Field(gt=0)]


class EvaluateParams(Section):
    """Settings of the evaluate stage."""

    resolution: tuple[Pixels, Pixels]
    """Height and width at which anomaly maps are compared with masks."""
    gallery: Annotated[int, Field(ge=0)]
    """Images in a gallery of the report."""


def main(line: str) -> None:
    """Evaluate `line` and write its three outputs."""
    torch.set_num_threads(RunSettings().cores())
    params = line_params(line, "evaluate", EvaluateParams)
    raw = Path("data/raw") / line
    bundle = load_bundle(Path("models") / line)
    shards = FeatureShards.open(Path("data/features") / line / "test")
    evaluation = evaluate(line, bundle, shards, raw, params.resolution)
    metrics, page = evaluation.metrics(), report(evaluation, raw, params.gallery)
    write_per_image(Path("evaluations") / line / "per_image.parquet", evaluation.images)
    with replacing(Path("reports") / line / "index.html") as draft:
        draft.write_text(page, encoding="utf-8")
    write_json(Path("metrics") / f"{line}.json", metrics)
    Console().print(
        f"evaluate {line}: {_told(evaluation, metrics)} See reports/{line}/index.html",
        highlight=False,
        soft_wrap=True,
    )


def _told(evaluation: Evaluation, metrics: Mapping[str, Any]) -> str:
    """What was found, in a sentence or two; in rich's markup."""
    chance = evaluation.at_chance()
    found = (
        f"image AUROC {figure(metrics['image_auroc'])} on {metrics['n_test_normal']} normal "
        f"and {metrics['n_test_anomalous']} anomalous images; {percent(metrics['tpr'])} found at "
        f"{percent(metrics['fpr'])} false alarms."
        if metrics["n_test_anomalous"]
        else f"{percent(metrics['fpr'])} false alarms on {metrics['n_test_normal']} normal images; there is no "
        "anomalous one, so what it finds is not known."
    )
    if chance:
        found += (
            f" [bold red]No better than chance, as far as these images tell: the 95 % interval of image AUROC is "
            f"{figure(chance.low)} to {figure(chance.high)}, and 0.5 is chance.[/]"
        )
    return found


def write_per_image(path: Path, images: Sequence[ScoredImage]) -> None:
    """One row an image, in the order given."""
    rows = [
        {
            "image_id": image.image_id,
            "path": image.path,
            "label": image.label,
            "defect": image.defect,
            "score": image.verdict.score,
            "p_value": image.verdict.p_value,
            "is_anomalous": image.verdict.is_anomalous,
            "needs_review": image.verdict.needs_review,
        }
        for image in images
    ]
    with replacing(path) as draft:
        pq.write_table(pa.Table.from_pylist(rows, schema=PER_IMAGE_SCHEMA), draft, compression="zstd")


if __name__ == "__main__":
    stage.run(main, __doc__, "python -m pipelines.evaluate solar-mono")
