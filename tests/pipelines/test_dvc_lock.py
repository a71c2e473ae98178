import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.adapters.dvc_lock import commit
from wtflow.errors import WTFlowError

STAGES = """
stages:
  make:
    foreach: [a, b, c]
    do:
      cmd: cp in-${item} out-${item}
      deps: ["in-${item}"]
      outs: ["out-${item}"]
"""


def dvc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "-q"], check=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    dvc("init", "--no-scm")
    (tmp_path / "dvc.yaml").write_text(STAGES)
    for name in "abc":
        (tmp_path / f"in-{name}").write_text(name)
        (tmp_path / f"out-{name}").write_text(name)
    return tmp_path


def test_stages_are_noted_as_the_command_notes_them(project: Path) -> None:
    lock = project / "dvc.lock"
    commit(["make@a", "make@c"])
    ours = lock.read_bytes()
    lock.unlink()
    dvc("commit", "--force", "make@a", "make@c")
    assert ours == lock.read_bytes()
    assert b"make@b" not in ours


def test_an_output_that_is_not_there_is_named(project: Path) -> None:
    (project / "out-a").unlink()
    with pytest.raises(WTFlowError, match="out-a"):
        commit(["make@a"])
    assert not (project / "dvc.lock").exists()


@pytest.mark.usefixtures("project")
def test_a_stage_that_is_not_there_is_named() -> None:
    with pytest.raises(WTFlowError, match=r"make@z: not in dvc\.yaml"):
        commit(["make@a", "make@z"])
