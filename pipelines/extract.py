"""Stage `extract`: what the frozen backbone sees of a line's images, training and test apart.

data/prepared/<line>/manifest.parquet + data/raw/<line>/ -> data/features/<line>/fit (train, calibrate) and /test

What the feature cache has is not computed again. The rest is computed in this process, or by Ray's workers where there
are some (`pipelines/adapters/ray_extract.py`); the bytes are the same.
"""

import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from pipelines.adapters import ray_extract
from pipelines.environment import RunSettings, progress, timings_file
from pipelines.feature_cache import feature_cache
from pipelines.lines import line_params
from pipelines.stage import run
from wtflow.artefact import replacing, write_json
from wtflow.data.manifest import Manifest, PrepareParams, Split
from wtflow.errors import WTFlowError
from wtflow.features.augment import with_copies
from wtflow.features.backbone import build_backbone
from wtflow.features.cache import fill
from wtflow.features.extract import ExtractParams, Job, Timing, extract

FEATURES = Path("data/features")
OUTPUTS: dict[str, tuple[Split, ...]] = {"fit": ("train", "calibrate"), "test": ("test",)}


def main(line: str) -> None:
    """Extract both outputs of `line`."""
    settings = RunSettings()
    torch.set_num_threads(settings.cores())
    params = line_params(line, "extract", ExtractParams)
    prepared = line_params(line, "prepare", PrepareParams)
    manifest = Manifest.read(Path(f"data/prepared/{line}/manifest.parquet"))
    backbone = build_backbone(params.backbone)
    job = Job(Path(f"data/raw/{line}").absolute(), feature_cache(), backbone, params, prepared.limits)
    with job.cache.held():
        # of other lines, or of this one when DVC did not start the stage
        fill(job.shelf, FEATURES, {row["image_id"] for row in with_copies(manifest.rows(), params.augment)})
        for output in OUTPUTS:
            _extract_output(line, output, manifest, job, prepared, settings)


def _extract_output(
    line: str, output: str, manifest: Manifest, job: Job, prepared: PrepareParams, settings: RunSettings
) -> None:
    started = time.perf_counter()
    photographs = manifest.rows(*OUTPUTS[output])
    rows = with_copies(photographs, job.params.augment)
    work = settings.work / "extract" / line / output
    facts = {
        "line": line,
        "data_version": manifest.data_version,
        "manifest_digest": manifest.digest,
        "backbone": job.params.backbone.model_dump(mode="json"),
        "limits": prepared.limits.model_dump(mode="json"),
    }
    with progress(f"extract {line}/{output}", len(rows)) as bar:

        def on_timing(timing: Timing) -> None:
            bar.advance(bar.task_ids[0], timing.images + timing.cached + timing.rejected)

        done = extract(rows, work, job, facts, ray_extract.compute_with(settings), on_timing)
    share = done.rejected.num_rows / len(photographs)
    if share > prepared.max_rejected_fraction:
        first = done.rejected.to_pylist()[0]
        raise WTFlowError(
            f"data/raw/{line}: {done.rejected.num_rows} of {len(photographs)} images could not be read again, first "
            f"{first['path']} ({first['reason']}: {first['detail']}). "
            f"Restore the images (dvc checkout), or type: dvc repro prepare@{line}"
        )
    _publish(work, FEATURES / line / output)
    seconds = time.perf_counter() - started
    _report(line, output, done.timing, seconds, timings_file(settings, f"extract-{output}", line))


def _publish(work: Path, target: Path) -> None:
    """Move the whole output to where DVC and readers look; what a killed run left between both is removed."""
    for left in target.parent.glob(f"{target.name}.tmp-*"):
        shutil.rmtree(left)
    with replacing(target) as draft:
        shutil.move(work, draft)


def _report(line: str, output: str, total: Timing, seconds: float, path: Path) -> None:
    write_json(path, {**asdict(total), "seconds": seconds})
    Console().print(
        f"extract {line}/{output}: {total.images} images computed, {total.cached} from the cache, {total.rejected} "
        f"rejected, in {seconds:.1f} s; {total.images / seconds:.1f} computed/s [seconds of threads: read "
        f"{total.read:.1f}, decode {total.decode:.1f}, infer {total.infer:.1f}, write {total.write:.1f}]",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    run(main, __doc__, "python -m pipelines.extract solar-mono")
