"""Many lines on one Ray: each is a task, which Ray starts where there is room, in the order of the lines.

A task trains in its own process with the plain loop, and computes what `ray_train` does with one worker, bit for bit.
Processes are used again, so that a line does not pay for the start of one. A task whose process or node dies is begun
again elsewhere, and goes on behind its last whole checkpoint.
"""

import errno
import logging
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs

from pipelines.adapters import ray_train
from pipelines.adapters.ray_runtime import cluster, here
from pipelines.environment import RunSettings
from pipelines.lines import line_params
from pipelines.train import train_line
from wtflow.data.shards import FeatureShards
from wtflow.errors import DigestError, WTFlowError
from wtflow.training import Epoch, Place, TrainingState, TrainParams, be_deterministic, start, train

RESTARTS = 3
POLL_S = 1.0
KEPT = 2
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class News:
    """An epoch of a line, or its start, when `done` is 0."""

    line: str
    node: str
    done: int
    epochs: int
    loss: float | None
    seconds: float
    """Since the line was started there."""
    images_per_s: float | None
    """In the last epoch."""


@dataclass(frozen=True)
class Ended:
    """A line's end."""

    line: str
    seconds: float
    """From the task's first line to its last."""
    run: str = ""
    """Name of the training run."""
    digest: str = ""
    """Of the bundle; "" if there is none."""
    error: str = ""


def fleet(
    lines: Sequence[str], settings: RunSettings, cpus: int, on_news: Callable[[Sequence[News]], None]
) -> Iterator[Ended]:
    """Train all lines on the cluster of RAY_ADDRESS, or on `cpus` of this machine; yields each as it ends."""
    with cluster(cpus, settings.line_cpus(), settings.line_gpus()):
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util.queue import Queue

        queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here()})
        fixed = settings.model_copy(update={"threads": settings.cores(), "work": settings.work.resolve()})
        task = ray.remote(_task).options(max_retries=RESTARTS, retry_exceptions=False, **_resources(fixed))
        left = list(lines)
        running: dict[Any, str] = {}
        while left or running:
            while left and (fixed.num_workers == 1 or len(running) < _places(fixed)):
                line = left.pop(0)
                running[task.remote(line, str(Path.cwd()), fixed.model_dump(mode="json"), queue)] = line
            done, _ = ray.wait(list(running), timeout=POLL_S)
            on_news([News(*values) for values in queue.get_nowait_batch(queue.qsize())])
            for reference in done:
                line = running.pop(reference)
                try:
                    yield ray.get(reference)
                except RayTaskError as error:
                    remedy = f"the project must be at the same path on all nodes, {Path.cwd()}"
                    yield Ended(line, 0.0, error=f"its process could not begin: {error}\n    {remedy}")
                except RayError as error:
                    yield Ended(line, 0.0, error=f"its process died {RESTARTS + 1} times, last: {error}")
        queue.shutdown()


def fit_here(
    name: str, features: Path, params: TrainParams, settings: RunSettings, on_epoch: Callable[[Epoch], None]
) -> TrainingState:
    """As `ray_train.fit` with one worker, in this process."""
    shards = FeatureShards.open(features, verify=False)
    ray_train.reach_storage(settings)
    checkpoints = Checkpoints(ray_train.storage(settings), name)
    be_deterministic()
    try:
        state = start(shards, params)
        checkpoints.restore(state)

        saved = time.monotonic()

        def keep(state: TrainingState, epoch: Epoch) -> None:
            nonlocal saved
            if len(state.history) == params.epochs or time.monotonic() - saved >= settings.checkpoint_s:
                checkpoints.save(state)
                saved = time.monotonic()
            on_epoch(epoch)

        device = torch.device("cuda" if settings.use_gpu else "cpu")
        train(state, shards, params, Place(device=device), on_epoch=keep)
    finally:
        torch.use_deterministic_algorithms(False)  # as in the stage, which calibrates outside of Ray's worker
    state.scorer.cpu().eval()
    return state


@dataclass(frozen=True)
class Checkpoints:
    """States of a run behind some of its epochs, in a folder or on S3; the newest ones are kept."""

    storage: str
    name: str

    def save(self, state: TrainingState) -> None:
        """Keep this one, drop an old one. A state is whole once its last file is there."""
        filesystem, root = self._place()
        target = f"{root}/{len(state.history):06d}"
        if isinstance(filesystem, fs.LocalFileSystem):
            try:
                state.save(Path(target))
            except OSError as error:
                shutil.rmtree(target, ignore_errors=True)  # half of a state is of no use, and the space may be
                error.filename = error.filename or target
                raise
        else:
            with tempfile.TemporaryDirectory() as folder:
                state.save(Path(folder))
                fs.copy_files(folder, target, fs.LocalFileSystem(), filesystem)
        for old in self._kept()[:-KEPT]:
            with suppress(FileNotFoundError):  # another clone that trains the same may have dropped it
                filesystem.delete_dir(old)

    def restore(self, state: TrainingState) -> None:
        """Continue the newest whole one, if there is any."""
        filesystem, _ = self._place()
        for path in reversed(self._kept()):
            with tempfile.TemporaryDirectory() as folder:
                fs.copy_files(path, folder, filesystem, fs.LocalFileSystem())
                try:
                    state.load(Path(folder))
                except DigestError as error:
                    logger.warning("%s", error)
                    continue
            return

    def _place(self) -> tuple[Any, str]:
        filesystem, root = fs.FileSystem.from_uri(self.storage)
        return filesystem, f"{root}/{self.name}/fleet"

    def _kept(self) -> list[str]:
        filesystem, root = self._place()
        found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
        return sorted(one.path for one in found if one.type == fs.FileType.Directory)


def _task(line: str, project: str, values: dict[str, Any], queue: Any) -> Ended:
    """What a worker runs for a line. Every error is that line's own."""
    import ray

    started, node = time.perf_counter(), ray.get_runtime_context().get_node_id()[:6]
    os.chdir(project)
    settings = RunSettings.model_validate(values)
    torch.set_num_threads(settings.cores())
    try:
        params = line_params(line, "train", TrainParams)
        _tell(queue, News(line, node, 0, params.epochs, None, 0.0, None))

        def on_epoch(epoch: Epoch) -> None:
            seconds = time.perf_counter() - started
            _tell(queue, News(line, node, epoch.epoch + 1, params.epochs, epoch.loss, seconds, epoch.images_per_s))

        done = train_line(line, params, settings, fit_here if settings.num_workers == 1 else ray_train.fit, on_epoch)
        return Ended(line, time.perf_counter() - started, done.name, done.digest)
    except WTFlowError as error:
        return Ended(line, time.perf_counter() - started, error=str(error))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        text = f"no space left for {error.filename or 'the output'} on node {node}: free some" if full else None
        return Ended(line, time.perf_counter() - started, error=text or traceback.format_exc())
    except Exception:  # noqa: BLE001  a fault of the code is told with its traceback; the other lines go on
        return Ended(line, time.perf_counter() - started, error=traceback.format_exc())


def _tell(queue: Any, news: News) -> None:
    """Send it, and do not wait: Ray gives the CPU of a task that waits to the next line, and too many train at once. A
    tuple, because the queue's process would import this module, and torch with it, to read `News`."""
    queue.actor.put_nowait.remote(astuple(news))


def _resources(settings: RunSettings) -> dict[str, float]:
    """Of a line's task. With several workers, Ray Train books theirs, and the task only waits for them."""
    if settings.num_workers > 1:
        return {"num_cpus": 0}
    return {"num_cpus": settings.cores(), "num_gpus": int(settings.use_gpu)}


def _places(settings: RunSettings) -> int:
    """How many lines have room at a time: more would only wait for their workers, until Ray gives up on them."""
    import ray

    found = ray.cluster_resources()
    places = int(found.get("CPU", 0) // settings.line_cpus())
    if settings.use_gpu:
        places = min(places, int(found.get("GPU", 0) // settings.num_workers))
    return max(1, places)
