"""A search in MLflow: a run for it, and below that one a trial. A search that was cut off goes on in the same runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipelines.adapters.tracking import flat, losable, run_of, tracking, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


class SearchRun:
    """The parent run. Plain values alone are pickled with it, so that another process can go on writing."""

    def __init__(self, line: str, key: str) -> None:
        self.line, self.key, self.uri = line, key, tracking_uri()
        self._runs: dict[str, str] = {}
        self._client: MlflowClient | None = None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Find the run of this search, or create it."""
        with tracking() as (client, experiment):
            self.experiment = experiment
            self.parent = run_of(client, experiment, self.line, self.key, flat(settings))

    def log(self, trial: str, values: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """An epoch of a trial. Warns if MLflow does not take it."""
        from mlflow.entities import Metric

        step = int(figures["epoch"])
        points = [Metric(name, value, 0, step) for name, value in figures.items() if name != "epoch"]
        with losable(f"trial {trial}: epoch {step}"):
            self.client.log_batch(self._run(trial, values), metrics=points)

    def end(self, trial: str, status: str) -> None:
        """A trial's last word. Warns if MLflow does not take it."""
        if trial in self._runs:
            with losable(f"trial {trial}: its end"):
                self.client.set_terminated(self._runs[trial], status)

    def finish(
        self, figures: Mapping[str, float], tags: Mapping[str, str], pictures: Mapping[str, Path], trials: Sequence[str]
    ) -> None:
        """What the search came to. Runs of trials that a killed driver had begun and not noted yet are deleted."""
        with tracking() as (client, experiment):
            for name, value in figures.items():
                client.log_metric(self.parent, name, value)
            for name, text in tags.items():
                client.set_tag(self.parent, name, text)
            for path in pictures.values():
                client.log_artifact(self.parent, str(path))
            for run in client.search_runs([experiment], f"tags.mlflow.parentRunId = '{self.parent}'"):
                if run.info.run_name not in trials:
                    client.delete_run(run.info.run_id)
                elif run.info.status == "RUNNING":  # the search's time was over
                    client.set_terminated(run.info.run_id, "KILLED")
            client.set_terminated(self.parent, "FINISHED")

    def say(self, text: str) -> None:
        """Print a line as it is."""
        Console().print(text, highlight=False, markup=False, soft_wrap=True)

    @property
    def client(self) -> "MlflowClient":
        """Made when it is first asked for."""
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self.uri)
        return self._client

    def _run(self, trial: str, values: Mapping[str, Any]) -> str:
        if trial not in self._runs:
            tags = {"mlflow.runName": trial, "mlflow.parentRunId": self.parent}
            key = f"{self.key}/{trial}"
            self._runs[trial] = run_of(self.client, self.experiment, self.line, key, values, **tags)
        return self._runs[trial]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None, "_runs": {}}
