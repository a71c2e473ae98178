"""The search of params.yaml for solar-mono, its driver killed once on the way: how long, and is its best better?

The search sees no test image and no defect. Afterwards its best settings and those of params.yaml are trained on the
whole of `train` with three seeds, and compared on the test split. `make repro` brings the features.
"""

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil
import yaml
from rich.console import Console

from benchmarks.product_lines import PLACE, PROJECT, ProductLine, image_auroc, product_lines, trained
from benchmarks.report import Claim, at_least, at_most, parse_no_arguments, publish
from pipelines.lines import read_params
from pipelines.search_space import nested
from wtflow.errors import WTFlowError
from wtflow.params import merged
from wtflow.training import TrainParams

LINE = "solar-mono"
SEEDS = (0, 1, 2)
WORK = PLACE / "tune_search"
TRIAL = re.compile(r"^trial (\d+): ", re.MULTILINE)
NO_CHANGE = "nothing to change"
BEST = re.compile(rf"^Best for {LINE}: (.+)$", re.MULTILINE)


def main() -> None:
    """Search, compare, publish."""
    parse_no_arguments(__doc__ or "", "make bench NAME=tune")
    shutil.rmtree(WORK, ignore_errors=True)
    trials = read_params()["tune"]["budget"]["trials"]
    began = time.perf_counter()
    first = _search(kill_after=trials // 2)
    printed = _search()
    minutes = (time.perf_counter() - began) / 60
    best = BEST.search(printed)
    if best is None and NO_CHANGE not in printed:
        raise WTFlowError(f"the search did not say what is best:\n{printed}")
    changes = (
        {key: yaml.safe_load(value) for key, value in (pair.split(": ") for pair in best[1].split(", "))}
        if best
        else {}
    )
    line = next(line for line in product_lines() if line.name == LINE)
    settings: dict[str, dict[str, Any]] = {"params.yaml": {}, "the search's best": changes}
    rows = [
        {
            "settings": name,
            "changes": changed,
            "minutes": minutes if changed else None,
            **_tested(line, changed),
        }
        for name, changed in settings.items()
    ]
    publish("tune", rows, claims(rows, minutes, len({*TRIAL.findall(first), *TRIAL.findall(printed)}), trials))


def claims(rows: list[dict[str, Any]], minutes: float, tried: int, trials: int) -> list[Claim]:
    """What it comes to."""
    default, best = rows
    return [
        at_most(f"{LINE}: minutes of a search of {trials} trials whose driver was killed once", minutes, 30),
        at_most(f"{LINE}: trials that are missing after the kill", trials - tried, 0),
        at_least(
            f"{LINE}: the search's best less params.yaml, mean image AUROC over {len(SEEDS)} seeds",
            best["image_auroc"] - default["image_auroc"],
            0,
        ),
    ]


def _search(kill_after: int | None = None) -> str:
    """Run the command, to its end or until so many trials have ended; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WTFLOW_", "RAY_"))}
    environment |= {"WTFLOW_WORK": str(WORK), "MLFLOW_TRACKING_URI": f"sqlite:///{WORK}/mlflow.db"}
    WORK.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipelines.tune", LINE]
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen: list[str] = []
    for said in process.stdout:
        seen.append(said)
        Console().print(said.rstrip(), highlight=False, markup=False)
        if kill_after is not None and len(TRIAL.findall("".join(seen))) >= kill_after:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            psutil.wait_procs(children, timeout=15)
            break
    process.stdout.close()
    if process.wait() not in (0, -signal.SIGKILL):
        raise SystemExit(f"the search failed with status {process.returncode}")
    return "".join(seen)


def _tested(line: ProductLine, changes: dict[str, Any]) -> dict[str, Any]:
    """Image AUROC on the test split, over the seeds."""
    fit, test, found = line.shards("fit"), line.shards("test"), []
    for seed in SEEDS:
        values = merged(line.train_params.model_dump(mode="json"), {**nested(changes), "seed": seed})
        params = TrainParams.parse(values, "the search's best")
        found.append(image_auroc(trained(fit, params), test))
    return {"image_auroc": statistics.mean(found), "sd": statistics.stdev(found), "seeds": found}


if __name__ == "__main__":
    main()
