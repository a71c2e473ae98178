from pathlib import Path

import pytest

from wtflow.features.links import link


def test_both_names_hold_the_bytes_and_outlive_each_other(tmp_path: Path) -> None:
    source, target = tmp_path / "one", tmp_path / "other"
    source.write_bytes(b"features")
    link(source, target)
    assert target.read_bytes() == b"features"
    source.unlink()
    assert target.read_bytes() == b"features"


def test_a_target_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    source, target = tmp_path / "one", tmp_path / "other"
    source.write_bytes(b"features")
    target.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        link(source, target)
    assert target.read_bytes() == b"precious"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system: /dev/shm")
def test_another_file_system_gets_a_copy(tmp_path: Path) -> None:
    source, target = tmp_path / "one", Path("/dev/shm") / f"wtflow-{tmp_path.name}-{id(tmp_path)}"
    source.write_bytes(b"features")
    if source.stat().st_dev == Path("/dev/shm").stat().st_dev:
        pytest.skip("/dev/shm is the same file system")
    try:
        link(source, target)
        assert (target.read_bytes(), target.stat().st_nlink) == (b"features", 1)
    finally:
        target.unlink()
