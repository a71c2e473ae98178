"""Where a stage runs: the settings that come from environment variables and never change a result."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunSettings(BaseSettings):
    """`WTFLOW_<NAME>` in the environment; see infra/env.example."""

    model_config = SettingsConfigDict(env_prefix="WTFLOW_", extra="ignore")

    work: Path = Path(".wtflow")
    """Unfinished work: partitions, checkpoints, timings. Safe to remove when nothing runs; shared by all nodes."""
    threads: int = 0
    """Torch threads a process; 0 takes the cores that this process may use."""
    num_workers: int = 1
    """Training workers a line."""
    use_gpu: bool = False
    """One GPU a training worker."""
    storage: str = ""
    """Where training checkpoints go: a folder or s3://bucket/prefix that all nodes see; empty: `work`/train."""
    checkpoint_s: float = 2.0
    """In the fleet: seconds between two checkpoints of a line, at least; 0 keeps one behind every epoch. A kill costs
    so much, or an epoch where one takes longer."""

    def cores(self) -> int:
        """Threads to use, resolved."""
        return self.threads or len(os.sched_getaffinity(0))


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
