"""Stage `extract`: what the frozen backbone sees of a line's images, training and test apart.

data/prepared/<line>/manifest.parquet + data/raw/<line>/ -> data/features/<line>/fit (train, calibrate) and /test
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from pipelines.environment import RunSettings, progress, timings_file
from pipelines.lines import line_params
from pipelines.stage import run
from wtflow.artefact import replacing, write_json
from wtflow.data.manifest import Manifest, PrepareParams, Split
from wtflow.errors import WTFlowError
from wtflow.features.backbone import Backbone, build_backbone
from wtflow.features.extract import ExtractParams, Partition, Timing, extract

OUTPUTS: dict[str, tuple[Split, ...]] = {"fit": ("train", "calibrate"), "test": ("test",)}


def main(line: str) -> None:
    """Extract both outputs of `line`."""
    settings = RunSettings()
    torch.set_num_threads(settings.cores())
    params = line_params(line, "extract", ExtractParams)
    prepared = line_params(line, "prepare", PrepareParams)
    manifest = Manifest.read(Path(f"data/prepared/{line}/manifest.parquet"))
    backbone = build_backbone(params.backbone)
    if settings.use_gpu:
        backbone = backbone.to("cuda")
    for output in OUTPUTS:
        _extract_output(line, output, manifest, backbone, params, prepared, settings)


def _extract_output(
    line: str,
    output: str,
    manifest: Manifest,
    backbone: Backbone,
    params: ExtractParams,
    prepared: PrepareParams,
    settings: RunSettings,
) -> None:
    rows = manifest.rows(*OUTPUTS[output])
    # partitions are kept here from run to run until the output is whole
    work = settings.work / "extract" / line / output
    facts = {
        "line": line,
        "data_version": manifest.data_version,
        "manifest_digest": manifest.digest,
        "backbone": params.backbone.model_dump(mode="json"),
        "limits": prepared.limits.model_dump(mode="json"),
    }
    total = Timing()
    with progress(f"extract {line}/{output}", len(rows)) as bar:

        def on_partition(number: int, partition: Partition) -> None:
            nonlocal total
            total = total + partition.timing
            bar.advance(bar.task_ids[0], partition.timing.images + partition.timing.rejected)

        rejected = extract(rows, Path(f"data/raw/{line}"), work, backbone, params, prepared.limits, facts, on_partition)
    share = rejected.num_rows / len(rows)
    if share > prepared.max_rejected_fraction:
        first = rejected.to_pylist()[0]
        raise WTFlowError(
            f"data/raw/{line}: {rejected.num_rows} of {len(rows)} images could not be read again, first "
            f"{first['path']} ({first['reason']}: {first['detail']}). "
            f"Restore the images (dvc checkout), or type: dvc repro prepare@{line}"
        )
    _publish(work, Path(f"data/features/{line}/{output}"))
    _report(line, output, total, timings_file(settings, f"extract-{output}", line))


def _publish(work: Path, target: Path) -> None:
    """Move the whole output to where DVC and readers look."""
    with replacing(target) as draft:
        shutil.move(work, draft)


def _report(line: str, output: str, total: Timing, path: Path) -> None:
    speed = total.images / total.seconds if total.seconds else 0.0
    write_json(path, {**asdict(total), "seconds": total.seconds})
    Console().print(
        f"extract {line}/{output}: {total.images} images ({total.rejected} rejected) in {total.seconds:.1f} s, "
        f"{speed:.1f} images/s [read {total.read:.1f} s, decode {total.decode:.1f}, infer {total.infer:.1f}, "
        f"write {total.write:.1f}]",
        highlight=False,
        markup=False,
    )


if __name__ == "__main__":
    run(main, __doc__, "python -m pipelines.extract solar-mono")
