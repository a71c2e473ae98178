"""Where a stage runs: the settings that come from environment variables and never change a result."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wtflow.errors import WTFlowError


class Settings(BaseSettings):
    """Read from the environment, where an empty variable counts as unset. A value that does not fit is a
    `WTFlowError` that names its variable."""

    model_config = SettingsConfigDict(extra="ignore", env_ignore_empty=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            prefix = self.model_config.get("env_prefix", "")
            wrong = [
                f"{prefix}{'.'.join(map(str, item['loc']))}".upper() + f": {item['msg']} (found {item['input']!r})"
                for item in error.errors()
            ]
            raise WTFlowError("; ".join(wrong) + ". Correct or unset it.") from None


def _place(value: str) -> str:
    if value and not value.startswith(("/", "s3://")):
        raise ValueError("has to be an absolute folder, or s3://bucket/prefix")
    return value


class RunSettings(Settings):
    """`WTFLOW_<NAME>` in the environment; see infra/env.example."""

    model_config = SettingsConfigDict(env_prefix="WTFLOW_")

    work: Path = Path(".wtflow")
    """Unfinished work: partitions, checkpoints, timings. Safe to remove when nothing runs; shared by all nodes."""
    threads: NonNegativeInt = 0
    """Torch threads a process; 0 takes the cores that this process may use."""
    num_workers: PositiveInt = 1
    """Training workers a line."""
    use_gpu: bool = False
    """One GPU a training worker."""
    storage: Annotated[str, AfterValidator(_place)] = ""
    """Where training checkpoints go: an absolute folder, or s3://bucket/prefix, that all nodes see; empty:
    `work`/train."""
    checkpoint_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """In the fleet: seconds between two checkpoints of a line, at least; 0 keeps one behind every epoch. A kill costs
    so much, or an epoch where one takes longer."""

    def cores(self) -> int:
        """Threads to use, resolved."""
        return self.threads or len(os.sched_getaffinity(0))

    def worker_threads(self) -> int:
        """Threads of each training worker of a line."""
        return max(1, self.cores() // self.num_workers)

    def line_cpus(self) -> int:
        """CPUs that a line asks for at once while it trains."""
        return self.worker_threads() * self.num_workers

    def line_gpus(self) -> int:
        """GPUs likewise."""
        return self.num_workers * self.use_gpu


@contextmanager
def progress(label: str, total: int) -> Iterator[Progress]:
    """A bar on stderr with one task of `total` pieces; silent when stderr is not a terminal."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        bar.add_task(label, total=total)
        yield bar


def timings_file(settings: RunSettings, stage: str, line: str) -> Path:
    """Where a stage notes its seconds: they differ from run to run, so no stage's output holds them."""
    return settings.work / "timings" / f"{stage}-{line}.json"
