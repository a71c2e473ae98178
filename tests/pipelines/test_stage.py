import errno
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.command import call
from pipelines.stage import run
from wtflow.errors import WTFlowError

EXAMPLE = "python -m pipelines.weigh solar-mono"


def start(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["weigh.py", *words])
    heard: list[str] = []
    run(heard.append, "Weigh the images of a line.", EXAMPLE)
    return heard


def test_the_line_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(monkeypatch, "solar-poly") == ["solar-poly"]


def test_help_shows_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, "--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m pipelines.weigh [-h] LINE")
    assert "Weigh the images of a line." in shown
    assert f"example: {EXAMPLE}" in shown


def test_no_line_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch)
    assert ended.value.code == 2


@pytest.mark.slow
def test_an_error_for_people_has_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.fetch", "solar-mono"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: params.yaml: not found.")
    assert done.stderr.count("\n") == 1


def test_a_full_disk_is_no_fault_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(line: str) -> None:
        Path("/dev/full").write_text(line)

    monkeypatch.setattr(sys, "argv", ["weigh.py", "solar-mono"])
    with pytest.raises(SystemExit, match=r"^error: no space left for the output"):
        run(fill_disk, "Weigh.", EXAMPLE)
    with pytest.raises(SystemExit, match=r"^error: no space left for the output.*type the same command"):
        call(lambda: fill_disk("solar-mono"))


@pytest.mark.parametrize("fault", [ValueError("a bug"), OSError(errno.EIO, "a broken disk")])
def test_other_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def fail(line: str) -> None:
        raise fault

    monkeypatch.setattr(sys, "argv", ["weigh.py", "solar-mono"])
    with pytest.raises(type(fault)):
        run(fail, "Weigh.", EXAMPLE)


def test_an_error_names_the_remedy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(line: str) -> None:
        raise WTFlowError(f"data/raw/{line}: no such folder. Type: dvc pull")

    monkeypatch.setattr(sys, "argv", ["weigh.py", "solar-mono"])
    with pytest.raises(SystemExit) as ended:
        run(fail, "Weigh.", EXAMPLE)
    assert ended.value.code == "error: data/raw/solar-mono: no such folder. Type: dvc pull"
