"""The training loop of `wtflow.training` under Ray Train: workers, checkpoints, restarts.

The run's name is made of everything that decides the result, and Ray continues a run of the same name in the same
storage: a killed stage that is started again goes on behind its last whole checkpoint.
"""

import logging
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs

from pipelines.adapters.ray_runtime import cluster, here, in_ray
from pipelines.environment import RunSettings
from wtflow.data.shards import FeatureShards
from wtflow.errors import DigestError, WTFlowError
from wtflow.training import Epoch, Place, TrainingState, TrainParams, be_deterministic, blank, start, train

CHECKPOINTS_KEPT = 2
RESTARTS = 3
WAITS = 30
"""For CPUs and GPUs, a minute each: a cluster that grows may need that long for a node."""
UNREADABLE = "CheckpointManagerInitializationError"
"""Ray's word for a run whose note of its checkpoints is half written, or names one that is gone."""
FULL = re.compile(r"(No space left on device|Disk quota exceeded)(: '(?P<path>[^']+)')?")
"""In the text of a worker's error; without a path it was the copy of a checkpoint to the storage."""
logger = logging.getLogger(__name__)


def fit(
    name: str, features: Path, params: TrainParams, settings: RunSettings, on_epoch: Callable[[Epoch], None]
) -> TrainingState:
    """Train on `features` and return the final state, on the CPU. `name` identifies the run; `on_epoch` is called here.

    Ray begins again when a worker dies in its training, but gives up when it dies while it is set up, and keeps what it
    had booked for it: then the run is continued here, on another Ray, or as another job of the cluster.

    Raises `WTFlowError` when the workers keep failing; what they finished is kept for the next try.
    """
    reach_storage(settings)
    tries = 1 if in_ray() else 1 + RESTARTS
    while True:
        tries -= 1
        try:
            return _fit(name, features, params, settings, on_epoch)
        except WTFlowError:
            raise
        except Exception as error:  # Ray wraps the worker's error in kinds of its own
            if not tries or not _died_early(error):
                raise WTFlowError(_failed(str(error), name, settings)) from error
            logger.warning("%s: a worker died while it was set up; trying again", name)


def _fit(
    name: str, features: Path, params: TrainParams, settings: RunSettings, on_epoch: Callable[[Epoch], None]
) -> TrainingState:
    threads, given_up = settings.worker_threads(), list[str]()
    with cluster(settings.cores(), settings.line_cpus(), settings.line_gpus()):
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        def trainer() -> Any:
            return TorchTrainer(
                _worker,
                train_loop_config={
                    "features": str(features.resolve()),
                    "params": params.model_dump(mode="json"),
                    "threads": threads,
                    "use_gpu": settings.use_gpu,
                    "queue": queue,
                },
                scaling_config=ScalingConfig(
                    num_workers=settings.num_workers,
                    use_gpu=settings.use_gpu,
                    resources_per_worker={"CPU": threads} | ({"GPU": 1} if settings.use_gpu else {}),
                ),
                torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
                run_config=RunConfig(
                    name=name,
                    storage_path=storage(settings),
                    failure_config=FailureConfig(max_failures=RESTARTS, controller_failure_limit=WAITS),
                    checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
                ),
            )

        with _watched(on_epoch, given_up.append) as queue:
            result = _fitted(trainer, name, settings)
        if given_up:
            raise WTFlowError(_failed(given_up[0], name, settings))
        state = blank(FeatureShards.open(features, verify=False), params)
        with result.checkpoint.as_directory() as folder:
            state.load(Path(folder))
        if len(state.history) < params.epochs:
            raise WTFlowError(_failed(f"it ended after {len(state.history)} of {params.epochs} epochs", name, settings))
        state.scorer.eval()
        return state


def _fitted(trainer: Callable[[], Any], name: str, settings: RunSettings) -> Any:
    """Ray's result. A run that was killed while Ray wrote its note, or within `forget`, is begun anew."""
    try:
        return trainer().fit()
    except Exception as error:
        if UNREADABLE not in str(error):
            raise
    logger.warning("%s/%s is damaged; starting from the first epoch, with the same result", storage(settings), name)
    forget(name, settings)
    return trainer().fit()  # another trainer: the first one's storage is gone


def _died_early(error: Exception) -> bool:
    """Whether Ray gave up over the death of a worker, and not over an error."""
    from ray.exceptions import RayActorError

    return isinstance(getattr(error, "controller_failure", None), RayActorError)


def _failed(error: str, name: str, settings: RunSettings) -> str:
    """What to say of a training that Ray gave up."""
    kept = f"{storage(settings)}/{name}"
    full = FULL.search(error)
    if full:
        place = full["path"] or kept
        return (
            f"training {name}: no space left for {place}. Free some, then type the same command: {kept} is continued."
        )
    return (
        f"training {name} failed: {error}\nIts checkpoints are kept in {kept}; "
        "mend the cause and type the same command to go on."
    )


def storage(settings: RunSettings) -> str:
    """Where the checkpoints of all runs are."""
    if settings.storage.startswith("s3://"):
        return settings.storage
    return str(Path(settings.storage or settings.work / "train").resolve())


def reach_storage(settings: RunSettings) -> None:
    """Raise a `WTFlowError` unless checkpoints can be written to S3, if they go there: Ray would say it at length."""
    if not storage(settings).startswith("s3://"):
        return
    try:
        filesystem, root = fs.FileSystem.from_uri(storage(settings))
        filesystem.create_dir(root)
    except (OSError, ValueError) as error:
        raise WTFlowError(
            f"WTFLOW_STORAGE: {storage(settings)} cannot be written to: {error}. Look at the bucket's name, "
            "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. What is there is kept: type the "
            "same command to go on."
        ) from error


def forget(name: str, settings: RunSettings) -> None:
    """Remove a run's checkpoints, if there are any: its result is in a bundle. Warns if they cannot be removed."""
    try:
        filesystem, root = fs.FileSystem.from_uri(storage(settings))
        filesystem.delete_dir(f"{root}/{name}")
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s/%s: its checkpoints stay; remove them by hand: %s", storage(settings), name, error)


def _worker(config: dict[str, Any]) -> None:
    """What each worker runs. Ray takes any error for a reason to start again; one that another start would not mend
    goes to the driver by the queue, and ends the run. Not with several workers, of which the others would wait."""
    import ray.train

    try:
        _train_here(config)
    except (WTFlowError, OSError) as error:
        stays = isinstance(error, WTFlowError) or FULL.search(str(error))
        if not stays or ray.train.get_context().get_world_size() > 1:
            raise
        config["queue"].put(str(error))


def _train_here(config: dict[str, Any]) -> None:
    """Build the state, continue a checkpoint if there is one, report every epoch."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    context = ray.train.get_context()
    torch.set_num_threads(config["threads"])
    be_deterministic()
    params = TrainParams.parse(config["params"], "train")
    shards = FeatureShards.open(Path(config["features"]), verify=context.get_world_rank() == 0)
    state = start(shards, params)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            try:
                state.load(Path(folder))
            except DigestError as error:
                logger.warning("%s; starting from the first epoch, with the same result", error)
    leads = context.get_world_rank() == 0

    def on_epoch(state: TrainingState, epoch: Epoch) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if leads:
                state.save(Path(folder))
            # every worker reports: Ray waits for all of them
            ray.train.report(asdict(epoch), ray.train.Checkpoint.from_directory(folder) if leads else None)
        if leads:
            config["queue"].put(asdict(epoch))

    place = Place(
        context.get_world_rank(),
        context.get_world_size(),
        get_device() if config["use_gpu"] else torch.device("cpu"),
    )
    train(
        state,
        shards,
        params,
        place,
        prepare_model if context.get_world_size() > 1 else lambda network: network,
        on_epoch,
    )


@contextmanager
def _watched(on_epoch: Callable[[Epoch], None], on_end: Callable[[str], None]) -> Iterator[Any]:
    """A queue for the leading worker's epochs, and for why it gave up; a thread hands them over as they come."""
    from ray.exceptions import RayActorError
    from ray.util.queue import Queue

    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here()})

    def hand_over() -> None:
        with suppress(RayActorError):
            while (values := queue.get()) is not None:
                if isinstance(values, str):
                    on_end(values)
                else:
                    on_epoch(Epoch(**values))

    thread = threading.Thread(target=hand_over, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        try:
            queue.put(None)
        except RayActorError as error:
            logger.warning("the epochs' queue is gone, and what it held was not logged: %s", error)
        thread.join(timeout=30)
        queue.shutdown()
