from pathlib import Path

from tests.data.raw_folders import write
from wtflow.data.tree import files, linked_folders, visible


def test_files_and_links_as_dvc_sees_them(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for name in ("b", "a/z", "a.b", ".hidden/x", ".git/config", "deep/.dvc/cache", ".hg"):
        write(raw / name, b"")
    (raw / "a/to file").symlink_to("z")
    (raw / "a/to folder").symlink_to(tmp_path)
    assert files(raw) == [".hidden/x", "a.b", "a/to file", "a/z", "b"]
    assert linked_folders(raw) == ["a/to folder"]


def test_visible() -> None:
    assert visible("good/a.png")
    assert not visible("good/.a.png")
    assert not visible(".good/a.png")
