"""MLflow tracking: one run a training, found again by the digest of the bundle that came out of it."""

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from wtflow.errors import WTFlowError
from wtflow.training import Epoch, TrainParams

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

EXPERIMENT = "wtflow"
TOLD_EVERY_S = 1.0
"""A call to MLflow takes as long as a tenth of a small line's epoch: short epochs share one."""
logger = logging.getLogger(__name__)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in this folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


@contextmanager
def tracking() -> Iterator[tuple["MlflowClient", str]]:
    """A client and the experiment's id. What goes wrong inside names the server and the remedy."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    with _told():
        mlflow.set_tracking_uri(tracking_uri())
        experiment = mlflow.set_experiment(EXPERIMENT).experiment_id
        yield mlflow.MlflowClient(), experiment


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong inside names the server and the remedy."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise WTFlowError(
            f"MLflow at {tracking_uri()}: {error}\nIs MLFLOW_TRACKING_URI right, does the server run, is there space?"
        ) from error


@contextmanager
def losable(what: str) -> Iterator[None]:
    """What MLflow does not take inside is told and lost: a curve is worth less than the training."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:  # OSError: a connection
        logger.warning("%s could not be noted in MLflow at %s: %s", what, tracking_uri(), error)


class TrainingRun:
    """The run of one training, written to while it goes on. A run of the same key that was cut off is continued."""

    def __init__(self, line: str, key: str, params: TrainParams) -> None:
        self.line, self.key, self.params = line, key, params
        self._untold: list[Metric] = []
        self._told_at = -math.inf

    def __enter__(self) -> Self:
        with tracking() as (client, experiment):
            self.client = client
            self.run_id = run_of(client, experiment, self.line, self.key, flat(self.params.model_dump(mode="json")))
            client.update_run(self.run_id, status="RUNNING")  # one that was cut off may have been told to have failed
        self._monitor = system_monitor(self.run_id)
        return self

    def log(self, epoch: Epoch) -> None:
        """The figures of the epoch, at once or together with those of the next ones. Warns if MLflow does not take
        them."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        values = asdict(epoch)
        step = values.pop("epoch")
        self._untold += [Metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self._told_at >= TOLD_EVERY_S:
            self._tell()

    def _tell(self) -> None:
        points, self._untold, self._told_at = self._untold, [], time.monotonic()
        if points:
            with losable(f"{self.key}: epoch {points[-1].step}"):
                self.client.log_batch(self.run_id, points)

    def finish(self, bundle_digest: str) -> None:
        """Say which bundle came out."""
        with _told():
            self.client.set_tag(self.run_id, "bundle_digest", bundle_digest)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell()
        if self._monitor:
            self._monitor.finish()
        try:
            with _told():
                self.client.set_terminated(self.run_id, "FINISHED" if error is None else "FAILED")
        except WTFlowError as untold:
            if error is None:
                raise
            logger.warning("%s", untold)  # what went wrong first is what has to be mended


def system_monitor(run_id: str) -> "SystemMetricsMonitor | None":
    """Writes the load of this machine to a run, every ten seconds, until it is finished; none where
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false, or the machine does not tell its load."""
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING as WANTED
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    if WANTED.is_set() and not WANTED.get():
        return None
    logging.getLogger(SystemMetricsMonitor.__module__).setLevel(logging.WARNING)  # not each start and end
    try:
        monitor = SystemMetricsMonitor(run_id, resume_logging=True)
        monitor.start()
    except Exception as error:  # noqa: BLE001  of psutil, as it comes where a container hides what it reads
        logger.warning("the machine's load will not be in MLflow: %s", error)
        return None
    return monitor


def run_of(client: "MlflowClient", experiment: str, line: str, key: str, params: Mapping[str, Any], **tags: str) -> str:
    """The run of this key, which is created with `params` if it is not there yet. Its name is the key, or what `tags`
    say under `mlflow.runName`."""
    from mlflow.entities import Param

    found = find_run(client, experiment, run_key=key)
    if found is None:
        named = {"line": line, "run_key": key, "mlflow.runName": key, **tags}
        found = str(client.create_run(experiment, tags=named).info.run_id)
        client.log_batch(found, params=[Param(name, str(value)) for name, value in params.items()])
    return found


def find_run(client: "MlflowClient", experiment: str, **tags: str) -> str | None:
    """The newest run with these tags."""
    query = " and ".join(f"tags.{name} = '{value}'" for name, value in tags.items())
    runs = client.search_runs([experiment], query, max_results=1)
    return runs[0].info.run_id if runs else None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `group.key: value`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result
