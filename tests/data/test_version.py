import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.data.raw_folders import write
from wtflow.data.version import data_version, md5_bytes
from wtflow.errors import WTFlowError


def dvc(folder: Path, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dvc", "-q", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_equals_what_dvc_writes(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for name in (
        "b.png",
        "a/b.png",
        "a.png",
        "a/é ü.png",
        "a-b/x",
        ".hidden",
        "deep/er/z.txt",
        "empty.png",
        ".gitignore",
    ):
        write(raw / name, b"" if name == "empty.png" else name.encode())
    write(raw / ".git/config", b"not data")
    write(raw / "windows.txt", b"one\r\ntwo\r\n")
    (raw / "nothing here").mkdir()
    outside = write(tmp_path / "elsewhere/o.png", b"outside")
    (raw / "link.png").symlink_to(outside)
    (raw / "linked folder").symlink_to(outside.parent)
    dvc(tmp_path, "init", "--no-scm")
    dvc(tmp_path, "add", "raw")
    written = yaml.safe_load((tmp_path / "raw.dvc").read_text())["outs"][0]
    assert data_version(raw) == written["md5"]
    assert written["nfiles"] == 11


def test_names_content_and_path(tmp_path: Path) -> None:
    write(tmp_path / "raw/a.png", b"1")
    first = data_version(tmp_path / "raw")
    write(tmp_path / "raw/a.png", b"2")
    assert data_version(tmp_path / "raw") != first
    write(tmp_path / "raw/a.png", b"1")
    assert data_version(tmp_path / "raw") == first
    (tmp_path / "raw/a.png").rename(tmp_path / "raw/b.png")
    assert data_version(tmp_path / "raw") != first


def test_takes_hashes_that_are_known_already(tmp_path: Path) -> None:
    write(tmp_path / "raw/a.png", b"1")
    write(tmp_path / "raw/b.png", b"2")
    plain = data_version(tmp_path / "raw")
    assert data_version(tmp_path / "raw", {"a.png": md5_bytes(b"1")}) == plain
    assert data_version(tmp_path / "raw", {"a.png": md5_bytes(b"other")}) != plain


def test_a_missing_folder_and_a_broken_link_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WTFlowError, match="Bring the data"):
        data_version(tmp_path / "raw")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.png").symlink_to("nowhere")
    with pytest.raises(WTFlowError, match=r"a\.png: a broken link .* Remove it"):
        data_version(tmp_path / "raw")


def test_a_file_that_may_not_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "raw/a.png", b"1")

    def refused(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(WTFlowError, match=r"a\.png: cannot be read \(Permission denied\)"):
        data_version(tmp_path / "raw")
