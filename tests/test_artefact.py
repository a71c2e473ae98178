import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wtflow.artefact import (
    canonical_json,
    digest_of,
    read_json,
    replacing,
    save_tensors,
    sha256_bytes,
    sha256_file,
    write_json,
)
from wtflow.errors import WTFlowError

SMALL_DISK = """
import resource, sys, torch
from pathlib import Path
from wtflow.artefact import save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_tensors(Path(sys.argv[1]), {"a": torch.ones(1_000_000)})
except OSError as error:
    print(error.errno, error.filename)
"""


def test_digests_are_sha256(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 1_000_000)
    assert sha256_file(path) == sha256_bytes(b"abc" * 1_000_000) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    assert digest_of({"b": 1, "a": [None, 0.1]}) == hashlib.sha256(b'{"a":[null,0.1],"b":1}').hexdigest()


def test_one_value_has_one_text() -> None:
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1}) == '{"a":2,"b":1}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


def test_json_round_trip_and_same_bytes(tmp_path: Path) -> None:
    value = {"ü": [1, 0.1, None, True], "a": {"z": "", "b": 1e-300}}
    write_json(tmp_path / "deep" / "one.json", value)
    write_json(tmp_path / "two.json", dict(reversed(value.items())))
    assert read_json(tmp_path / "deep" / "one.json") == value
    assert (tmp_path / "deep" / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_json_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(WTFlowError, match=r"gone\.json: not there"):
        read_json(tmp_path / "gone.json")
    whole = json.dumps({"key": [1, 2, 3]}).encode()
    for broken in (b"", whole[:-1], b"\xff" + whole):
        (tmp_path / "half.json").write_bytes(broken)
        with pytest.raises(WTFlowError, match=r"half\.json: not valid JSON"):
            read_json(tmp_path / "half.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), replacing(path) as draft:
        draft.write_text("half")
        raise RuntimeError("stop")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("first", "second"):
        with replacing(path) as draft:
            draft.mkdir()
            (draft / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["second"]
    with pytest.raises(RuntimeError, match="stop"), replacing(path) as draft:
        draft.mkdir()
        (draft / "third").touch()
        raise RuntimeError("stop")
    assert [file.name for file in path.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "folder", Path.rename
    path.mkdir()
    (path / "old").touch()

    def refuse(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise OSError(errno.EIO, "refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="refused"), replacing(path) as draft:
        draft.mkdir()
        (draft / "new").touch()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_folder_is_replaced_and_what_it_points_to_is_not(tmp_path: Path) -> None:
    path, store = tmp_path / "folder", tmp_path / "store"
    store.mkdir()
    (store / "old").touch()
    path.symlink_to(store)
    with replacing(path) as draft:
        draft.mkdir()
        (draft / "new").touch()
    assert not path.is_symlink()
    assert [file.name for folder in (path, store) for file in folder.iterdir()] == ["new", "old"]
    assert sorted(tmp_path.iterdir()) == [path, store]


def test_tensors_round_trip_with_the_same_bytes(tmp_path: Path) -> None:
    named = {"a": torch.randn(3, 4).T, "b": torch.tensor(7), "c": torch.randn(5).half()}
    save_tensors(tmp_path / "one.safetensors", named, metadata={"note": "x"})
    save_tensors(tmp_path / "two.safetensors", dict(reversed(named.items())), metadata={"note": "x"})
    read = load_file(tmp_path / "one.safetensors")
    assert all(torch.equal(read[name], value) for name, value in named.items())
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_tensors_are_readable_by_whom_other_files_are(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.safetensors")}
    assert len(modes) == 1


@pytest.mark.slow
def test_a_disk_that_fills_raises_oserror_and_leaves_nothing(tmp_path: Path) -> None:
    """Under a limit on the size of files, which the system enforces like the end of a disk."""
    path = tmp_path / "a.safetensors"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(path)], env=environment, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == (f"{errno.EFBIG} {path}", 0), done.stderr
    assert list(tmp_path.iterdir()) == []
