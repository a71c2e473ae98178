"""infra/setup_env.sh with a Python that installs nothing: what it takes for installed, and what it never removes."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.guards.closure import ROOT

STUB = """#!/bin/bash
echo "$@" >> "{log}"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python"; fi
if [ "$1" = -c ]; then echo "$(dirname "$0")"; fi
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    stub = tmp_path / "python"
    stub.write_text(STUB.format(log=tmp_path / "log"))
    stub.chmod(0o755)
    path = tmp_path / "some.lock"
    path.write_text("torch==1\n")
    return path


def setup(lock: Path, venv: Path, *base: Path) -> tuple[int, str, int]:
    """Status, messages, and how often pip was called."""
    log = lock.with_name("log")
    log.unlink(missing_ok=True)
    done = subprocess.run(
        [ROOT / "infra/setup_env.sh", venv, lock, *base],
        env={**os.environ, "PYTHON": str(lock.with_name("python"))},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr, log.read_text().count("-m pip install") if log.exists() else 0


def digest_of(*locks: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in locks)).hexdigest()


def test_once_and_again_when_the_lock_has_changed(tmp_path: Path, lock: Path) -> None:
    venv = tmp_path / "mine"
    assert setup(lock, venv) == (0, "", 1)
    assert (venv / ".ready").read_text().strip() == digest_of(lock)
    assert setup(lock, venv) == (0, "", 0)
    lock.write_text("torch==2\n")
    assert setup(lock, venv) == (0, "", 1)
    assert setup(lock, venv) == (0, "", 0)


def test_an_earlier_installation_in_the_default_folder_counts(tmp_path: Path, lock: Path) -> None:
    for name, installs in ((f"venv-{digest_of(lock)[:12]}", 0), ("mine", 1)):
        (tmp_path / name).mkdir()
        for file in (".ready", "pyvenv.cfg"):
            (tmp_path / name / file).touch()
        assert setup(lock, tmp_path / name) == (0, "", installs)


def test_the_second_environment_counts_with_both_locks(tmp_path: Path, lock: Path) -> None:
    base, venv = tmp_path / "base", tmp_path / "peers"
    assert setup(lock, base) == (0, "", 1)
    assert setup(lock, venv, base) == (0, "", 1)
    assert (venv / ".ready").read_text().strip() == digest_of(ROOT / "requirements.lock", lock)
    assert setup(lock, venv, base) == (0, "", 0)
    named = tmp_path / f"peers-{digest_of(ROOT / 'requirements.lock', lock)[:12]}"
    named.mkdir()
    (named / ".ready").touch()
    assert setup(lock, named, base) == (0, "", 0)


def test_a_folder_of_other_things_is_never_removed(tmp_path: Path, lock: Path) -> None:
    venv = tmp_path / "home"
    venv.mkdir()
    assert setup(lock, venv)[0] == 0  # an empty folder is taken
    other = tmp_path / "photographs"
    other.mkdir()
    (other / "1.png").write_text("a photograph")
    status, said, installs = setup(lock, other)
    assert (status, installs) == (1, 0)
    assert said.startswith(f"error: {other} is not empty and no Python environment")
    assert (other / "1.png").read_text() == "a photograph"


def test_an_environment_that_someone_else_made_is_never_removed(tmp_path: Path, lock: Path) -> None:
    venv = tmp_path / "theirs"
    venv.mkdir()
    (venv / "pyvenv.cfg").touch()
    status, said, installs = setup(lock, venv)
    assert (status, installs) == (1, 0)
    assert "no Python environment that this command made" in said
    assert (venv / "pyvenv.cfg").exists()


def test_what_was_cut_off_is_done_anew(tmp_path: Path, lock: Path) -> None:
    venv = tmp_path / "mine"
    setup(lock, venv)
    (venv / ".ready").unlink()
    assert setup(lock, venv) == (0, "", 1)
