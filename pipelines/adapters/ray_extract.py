"""Partitions of an extraction as Ray tasks: each puts one shard into the feature cache, which all nodes must see.

A task whose process or node dies is begun again elsewhere; what it had half written, nobody reads. The weights come
from the driver, so that every node has the same ones.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.adapters.ray_runtime import cluster, in_ray
from pipelines.environment import RunSettings
from wtflow.data.images import ImageLimits
from wtflow.errors import WTFlowError
from wtflow.features.backbone import build_backbone
from wtflow.features.cache import FeatureCache
from wtflow.features.extract import Compute, ExtractParams, Job, Partition, Rows, compute_here

RESTARTS = 3
QUEUED = 2
"""Tasks that wait for a place, for each that has one."""


def compute_with(settings: RunSettings) -> Compute:
    """Where partitions are computed: on Ray with RAY_ADDRESS or several workers, unless there is one task only, and no
    need of a GPU, which this machine may lack; else in this process."""

    def compute(job: Job, groups: Sequence[Rows]) -> Iterator[Partition]:
        several = settings.num_workers > 1 or bool(os.environ.get("RAY_ADDRESS"))
        if not several or (len(groups) < 2 and not settings.use_gpu) or in_ray():
            if settings.use_gpu:
                job.backbone.to("cuda")
            return compute_here(job, groups)
        return _compute(job, groups, settings)

    return compute


def _compute(job: Job, groups: Sequence[Rows], settings: RunSettings) -> Iterator[Partition]:
    with cluster(settings.cores(), gpus=int(settings.use_gpu)):
        import ray
        from ray.exceptions import RayError, RayTaskError

        threads = max(1, settings.cores() // settings.num_workers)
        resources = {"num_cpus": threads, "num_gpus": int(settings.use_gpu)}
        task = ray.remote(_task).options(max_retries=RESTARTS, retry_exceptions=False, **resources)
        weights = ray.put({name: value.cpu().numpy() for name, value in job.backbone.network.state_dict().items()})
        facts = ray.put(_facts(job, threads, settings.use_gpu))
        left = list(reversed(groups))
        running: set[Any] = set()
        while left or running:
            while left and len(running) < _places(threads, settings.use_gpu) * (1 + QUEUED):
                running.add(task.remote(left.pop(), facts, weights))
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                running.remove(reference)
                try:
                    yield _visible(ray.get(reference), job)
                except RayTaskError as error:
                    raise error.cause from None
                except RayError as error:
                    raise WTFlowError(
                        f"extract: the process of a partition died {RESTARTS + 1} times, last: {error}. What is done "
                        "is kept: mend the cause (memory?), then run the stage again."
                    ) from error


def _places(threads: int, use_gpu: bool) -> int:
    """Tasks that have room at a time, on the nodes that there are now."""
    import ray

    found = ray.cluster_resources()
    places = int(found.get("CPU", 0) // threads)
    return max(1, min(places, int(found.get("GPU", 0))) if use_gpu else places)


def _visible(partition: Partition, job: Job) -> Partition:
    """A partition whose shard is where this process looks for it."""
    if partition.shard and not job.shelf.file(partition.shard).is_file():
        raise WTFlowError(
            f"{job.shelf.folder}: a worker wrote {partition.shard[:12]}... to this folder of its machine, but it is "
            "not in that of this one. Set WTFLOW_FEATURES to a folder that all machines share."
        )
    return partition


def _facts(job: Job, threads: int, use_gpu: bool) -> dict[str, Any]:
    return {
        "raw": str(job.raw.absolute()),
        "cache": str(job.cache.folder.absolute()),
        "params": job.params.model_dump(mode="json"),
        "limits": job.limits.model_dump(mode="json"),
        "backbone_digest": job.backbone.digest,
        "threads": threads,
        "device": "cuda" if use_gpu else "cpu",
    }


_jobs: dict[str, Job] = {}
"""Of this worker's process, which is used for many partitions."""


def _task(group: Rows, facts: dict[str, Any], weights: dict[str, Any]) -> Partition:
    """What a worker does for a partition. The driver holds the cache's lock."""
    torch.set_num_threads(facts["threads"])
    (partition,) = compute_here(_job(facts, weights), [group])
    return partition


def _job(facts: dict[str, Any], weights: dict[str, Any]) -> Job:
    key = repr(facts)
    if key not in _jobs:
        params = ExtractParams.parse(facts["params"], "extract")
        given = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
        backbone = build_backbone(params.backbone, given).to(facts["device"])
        limits = ImageLimits.parse(facts["limits"], "prepare.limits")
        _jobs[key] = Job(Path(facts["raw"]), FeatureCache(Path(facts["cache"])), backbone, params, limits)
    return _jobs[key]
