import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import main_job
from tests.guards.closure import ROOT
from wtflow.artefact import write_json

MINUTES = "minutes of all stages of the default lines, one after the other"


def rows(cached: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in main_job.LIMITS:
        found += [{"line": line, "what": f"stage {stage}", "seconds": 30.0} for stage in main_job.STAGES]
        found[-4]["cached"] = cached  # of extract
        found += [{"line": line, "what": what, "image_auroc": 0.95} for what in ("mean", "nearest neighbours")]
    return found


def said(found: list[dict[str, Any]]) -> dict[str, float]:
    return {claim.claim: claim.value for claim in main_job._claims(found)}


def test_minutes_are_claimed_of_stages_that_all_ran_in_full() -> None:
    assert said(rows())[MINUTES] == 6.0
    assert MINUTES not in said([row for row in rows() if not row["what"].startswith("stage ")])
    assert MINUTES not in said([row for row in rows() if row["what"] != "stage fetch" or row["line"] != "solar-poly"])
    assert MINUTES not in said(rows(cached=1))
    assert len(said(rows(cached=1))) == 4


def test_timings_are_read_where_stages_leave_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WTFLOW_WORK", str(tmp_path))
    write_json(tmp_path / "timings/extract-tiny.json", {"seconds": 4.0, "peak_gib": 1.0})
    for name, cached in (("fit", 3), ("test", 0)):
        write_json(tmp_path / f"timings/extract-{name}-tiny.json", {"images": 10, "cached": cached, "seconds": 2.0})
    (row,) = main_job._stage_rows("tiny", main_job.PROJECT)
    assert (row["what"], row["seconds"], row["images_per_second"], row["cached"]) == ("stage extract", 4.0, 5.0, 3)
    assert main_job._stage_rows("tiny", tmp_path) == []


def test_make_hands_options_on() -> None:
    done = subprocess.run(
        ["make", "-n", "bench", "NAME=accuracy", "ARGS=--kept"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "python -m benchmarks.accuracy --kept\n" in done.stdout
