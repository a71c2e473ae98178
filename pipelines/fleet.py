"""Train every line whose `train` stage is stale, all at once, on one Ray: here, or on the cluster of RAY_ADDRESS.

Each line takes WTFLOW_THREADS CPUs, as in `dvc repro` (all cores if it is not set, so set it to have several lines at a
time), and a GPU with WTFLOW_USE_GPU. Lines start in the order of params.yaml as there is room. What comes out is what
`dvc repro` makes with the same threads, and `dvc status` knows it. A line that fails does not stop the others. Killed,
the same command goes on.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.adapters import dvc_lock
from pipelines.command import call, parser
from pipelines.environment import RunSettings
from pipelines.fleet_table import FleetTable
from pipelines.lines import known_line, line_params, read_params
from pipelines.provenance import stage_code
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.training import TrainParams

COMMIT_EVERY_S = 60
COMMIT_SHARE = 0.03
"""Of the time, at most: a commit takes seconds where there are many lines."""
BEFORE = ("fetch", "prepare", "extract")
"""Stages whose outputs `train` reads, its own line's."""
EXAMPLES = """examples:
  python -m pipelines.fleet                        every stale line, each on all cores
  WTFLOW_THREADS=1 python -m pipelines.fleet       a line on each core
  RAY_ADDRESS=head:6379 WTFLOW_THREADS=8 WTFLOW_USE_GPU=true python -m pipelines.fleet
  python -m pipelines.fleet solar-mono solar-poly  these only
then: dvc repro, which evaluates and registers"""


def main(chosen: Sequence[str], cpus: int) -> None:
    """Train what is stale and tell DVC; raises `WTFlowError` at the end when a line failed."""
    params = read_params()
    for line in chosen:
        known_line(params, line)
    lines = list(dict.fromkeys(chosen or params["lines"]))
    stale, blocked = stale_lines(lines)
    say(f"fleet: {len(lines) - len(stale) - len(blocked)} of {len(lines)} lines up to date, {len(stale)} to train")
    failed = dict(blocked)
    if stale:
        failed |= _train(stale, RunSettings(), cpus)
    if failed:
        told = [f"  {line}: {error}" for line, error in failed.items()]
        raise WTFlowError("\n".join([f"fleet: {len(failed)} of {len(lines)} lines failed:", *told]))


def stale_lines(lines: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Lines that have to be trained, and those that cannot be yet, with the reason."""
    # of all stages: DVC reads dvc.lock again for each one that is named
    changed = json.loads(_dvc("status", "--json"))
    if code := [name for name in changed if name.startswith("code-")]:
        _dvc("repro", "--quiet", *code)
        changed = json.loads(_dvc("status", "--json"))
    stale, blocked = [], {}
    for line in lines:
        before = [name for name in (f"{stage}@{line}" for stage in BEFORE) if name in changed]
        raw = [name for name in changed if name == f"data/raw/{line}.dvc"]
        if before or raw:
            blocked[line] = f"{', '.join([*raw, *before])} changed. Type: dvc repro extract@{line}"
        elif f"train@{line}" in changed:
            stale.append(line)
    return stale, blocked


def _train(lines: Sequence[str], settings: RunSettings, cpus: int) -> dict[str, str]:
    """Errors by line."""
    from pipelines.adapters.ray_fleet import fleet
    from pipelines.adapters.tracking import tracking

    with tracking():
        pass  # makes the database, which many processes at once would not
    failed: dict[str, str] = {}
    waiting: dict[str, str] = {}
    due = time.monotonic() + COMMIT_EVERY_S
    try:
        with FleetTable(lines) as table:
            for ended in fleet(lines, settings, cpus, table.tell):
                table.end(ended)
                if ended.error:
                    failed[ended.line] = f"{ended.error}\n    Mend it, then type the same command"
                else:
                    waiting[ended.line] = ended.run
                if (began := time.monotonic()) > due:
                    failed |= _commit_if_free(waiting)
                    ended_at = time.monotonic()
                    due = ended_at + max(COMMIT_EVERY_S, (ended_at - began) / COMMIT_SHARE)
    finally:  # cut off, it notes what is trained all the same
        failed |= commit(waiting)
    return failed


def _commit_if_free(waiting: dict[str, str]) -> dict[str, str]:
    """As `commit`, and `waiting` is empty then; while another DVC command is at work it stays as it is."""
    try:
        failed = commit(waiting)
    except WTFlowError as error:
        say(f"fleet: {error}\nTried again later.")
        return {}
    waiting.clear()
    return failed


def commit(runs: Mapping[str, str]) -> dict[str, str]:
    """Have DVC note that these lines are trained. A line whose settings, features or code changed meanwhile is not, and
    comes back with the reason."""
    changed = {line: reason for line, run in runs.items() if (reason := _changed(line, run))}
    done = [f"train@{line}" for line in runs if line not in changed]
    if done:
        dvc_lock.commit(done)
    return changed


def _changed(line: str, run: str) -> str | None:
    """Why the line is not any more what `run` trained; None if it is."""
    from pipelines.train import features_folder, run_name

    try:
        params = line_params(line, "train", TrainParams)
        now = run_name(line, params, FeatureShards.open(features_folder(line), verify=False), stage_code("train"))
    except WTFlowError as error:  # renamed, removed, or params.yaml half written
        return f"changed while it trained: {error}"
    return None if now == run else "changed while it trained. Type the same command"


def _dvc(*arguments: str) -> str:
    environment: dict[str, Any] = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path.cwd())
    if done.returncode:
        raise WTFlowError(f"dvc {' '.join(arguments[:2])} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def say(text: str) -> None:
    """Print as it is."""
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    options = parser("pipelines.fleet", __doc__, EXAMPLES)
    options.add_argument("lines", metavar="LINE", nargs="*", help="product lines; all of params.yaml if none is named")
    options.add_argument(
        "--cpus",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="of this machine, without RAY_ADDRESS; default: all",
    )
    arguments = options.parse_args()
    call(lambda: main(arguments.lines, arguments.cpus))
