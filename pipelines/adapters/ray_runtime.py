"""Ray as the pipeline uses it: joins the cluster of RAY_ADDRESS, or starts one on this machine and stops it again."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wtflow.errors import WTFlowError

DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # every report() waits for this poll
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # `ray job submit --runtime-env` may name what is handed over here too
    "RAY_worker_niceness": "0",  # Ray's 15 lets anything else on the machine starve a training
}

PASSED = ("WTFLOW_", "AWS_", "MLFLOW_")
SECRET = re.compile("KEY|SECRET|TOKEN|PASSWORD")
"""Whoever sees a cluster's dashboard sees what is handed to its tasks, so these stay where they are: a Ray that is
started here has this process's environment anyway, and the nodes of a cluster bring credentials of their own."""


def in_ray() -> bool:
    """Whether this process has a Ray already. Does not import it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def passed(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings that tasks need, without what is secret."""
    return {name: value for name, value in environment.items() if name.startswith(PASSED) and not SECRET.search(name)}


@contextmanager
def cluster(cores: int, cpus: int = 0, gpus: int = 0) -> Iterator[None]:
    """A connected Ray. Workers see the project's code and the settings of this process. In a task, it is the task's.

    Raises `WTFlowError` if one that is started here, with `cores` CPUs, never had the `cpus` and `gpus` that a line
    asks for at once: Ray would wait for them.
    """
    if in_ray():
        yield
        return
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of this process alone, gone with it
        _has("CPUs", cores, cpus, "Lower WTFLOW_NUM_WORKERS or WTFLOW_THREADS (unset: all cores), or raise --cpus")
    import ray

    runtime = {"env_vars": {**passed(os.environ), "PYTHONPATH": str(Path.cwd())}}
    local = {"num_cpus": max(1, cores), "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, runtime_env=runtime, log_to_driver=False, logging_level="ERROR", **local)
    except Exception as error:  # of several kinds, plain ones among them
        what = (
            "Ray did not start on this machine" if local else f"RAY_ADDRESS: no Ray at {address} lets this process in"
        )
        remedy = (
            "Is it overloaded?" if local else "Is the address right, does the cluster run, is RAY_AUTH_MODE the same?"
        )
        raise WTFlowError(f"{what}: {error}\n{remedy} Then type the same command.") from error
    try:
        if local:
            found = int(ray.cluster_resources().get("GPU", 0))
            _has("GPUs", found, gpus, "Unset WTFLOW_USE_GPU, or lower WTFLOW_NUM_WORKERS")
        yield
    finally:
        ray.shutdown()


def _has(what: str, found: int, asked: int, remedy: str) -> None:
    """Raise unless there is as much as is asked for."""
    if asked > found:
        raise WTFlowError(
            f"WTFLOW_THREADS, WTFLOW_NUM_WORKERS, WTFLOW_USE_GPU: a line asks for {asked} {what} at once, and Ray has "
            f"{found} on this machine. {remedy}."
        )


def here() -> Any:
    """Ray's strategy for an actor on the node of this process: a queue must not go with another one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
