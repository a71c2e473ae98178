import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.raw_folders import write
from wtflow.data.tree import files, linked_folders, visible
from wtflow.errors import WTFlowError


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


@pytest.mark.parametrize("closed", ["raw", "raw/good/lot2"])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    write(tmp_path / "raw/good/lot2/a.png", b"")
    scandir = os.scandir

    def refused(place: str) -> Iterator[os.DirEntry[str]]:
        if Path(place) == tmp_path / closed:
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refused)  # root may list everything, and tests may run as root
    for look in (files, linked_folders):
        with pytest.raises(WTFlowError, match=rf"{closed}: .* cannot be listed \(Permission denied\)\. Mend its"):
            look(tmp_path / "raw")
