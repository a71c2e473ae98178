import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import fleet
from pipelines.adapters import ray_extract
from pipelines.adapters.ray_extract import compute_with
from pipelines.adapters.s3 import S3Settings
from pipelines.command import call
from pipelines.environment import RunSettings, Settings
from pipelines.feature_cache import feature_cache
from tests.guards.closure import ROOT
from wtflow.errors import WTFlowError


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (RunSettings, "WTFLOW_THREADS", "abc"),
        (RunSettings, "WTFLOW_THREADS", "-1"),
        (RunSettings, "WTFLOW_NUM_WORKERS", "0"),
        (RunSettings, "WTFLOW_USE_GPU", "perhaps"),
        (RunSettings, "WTFLOW_CHECKPOINT_S", "-1"),
        (RunSettings, "WTFLOW_CHECKPOINT_S", "nan"),
        (RunSettings, "WTFLOW_STORAGE", "gs://bucket/train"),
        (RunSettings, "WTFLOW_STORAGE", "checkpoints"),
        (S3Settings, "WTFLOW_S3_TIMEOUT", "0"),
        (S3Settings, "WTFLOW_S3_ATTEMPTS", "many"),
    ],
)
def test_a_value_that_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, settings: type[Settings], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(WTFlowError, match=rf"^{name}: .* \(found '{value}'\)\. Correct or unset it\.$"):
        settings()


def test_empty_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORK", "THREADS", "NUM_WORKERS", "USE_GPU", "STORAGE", "CHECKPOINT_S", "FEATURES", "S3_PAUSE"):
        monkeypatch.setenv(f"WTFLOW_{name}", "")
    settings = RunSettings()
    assert (settings.work, settings.threads, settings.num_workers) == (Path(".wtflow"), 0, 1)
    assert S3Settings().pause == 0.5
    assert feature_cache().folder == Path(".wtflow/features").absolute()


def test_an_empty_ray_address_asks_for_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr(ray_extract, "compute_here", lambda job, groups: iter(["here"]))
    assert list(compute_with(RunSettings())(None, [[], []])) == ["here"]  # type: ignore[arg-type]


def test_the_fleet_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WTFLOW_THREADS", "abc")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(fleet, "stale_lines", lambda lines: (["solar-mono"], {}))
    with pytest.raises(SystemExit, match=r"^error: WTFLOW_THREADS: "):
        call(lambda: fleet.main([], 1))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", "tune", "fetch", "reproduce"])
def test_it_reaches_the_user_as_an_error(tmp_path: Path, command: str) -> None:
    """Before anything is done."""
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    (tmp_path / "images/bottle/train").mkdir(parents=True)
    words = ["mvtec_ad", "images"] if command == "reproduce" else ["solar-mono"]
    done = subprocess.run(
        [sys.executable, "-m", f"pipelines.{command}", *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "WTFLOW_THREADS": "abc"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: WTFLOW_THREADS: "), done.stderr
