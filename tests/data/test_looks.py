import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.data.raw_folders import encoded, fill, noise, params, plain_folder
from wtflow.data import looks as module
from wtflow.data.images import ImageLimits, decode
from wtflow.data.looks import Looks
from wtflow.data.prepare import Prepared, prepare
from wtflow.errors import ImageError


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every photograph that is decoded."""
    found: list[int] = []

    def counted(data: bytes, limits: ImageLimits) -> object:
        found.append(len(data))
        return decode(data, limits)

    monkeypatch.setattr(module, "decode", counted)
    return found


def contents(prepared: Prepared) -> list[object]:
    return [prepared.manifest.digest, prepared.rejected.to_pylist(), prepared.findings.to_pylist()]


def test_a_line_that_grows_has_its_new_photographs_decoded(tmp_path: Path, decoded: list[int]) -> None:
    raw, kept = plain_folder(tmp_path / "raw"), tmp_path / "kept"
    first = prepare(raw, "alpha", params(), looks=kept)
    assert len(decoded) == 33
    assert contents(prepare(raw, "alpha", params(), looks=kept)) == contents(first)
    assert len(decoded) == 33
    fill(raw, ["good/new.png"], first_seed=50)
    (raw / "good/000.png").rename(raw / "good/another name.png")
    grown = prepare(raw, "alpha", params(), looks=kept)
    assert len(decoded) == 34
    assert contents(grown) == contents(prepare(raw, "alpha", params()))
    assert len(list(kept.iterdir())) == 1


def test_what_is_gone_from_the_line_is_forgotten(tmp_path: Path) -> None:
    raw, kept = plain_folder(tmp_path / "raw"), tmp_path / "kept"
    prepare(raw, "alpha", params(), looks=kept)
    (raw / "good/000.png").unlink()
    prepare(raw, "alpha", params(), looks=kept)
    assert pq.read_table(next(kept.iterdir())).num_rows == 32


def test_a_damaged_photograph_is_rejected_every_time(tmp_path: Path) -> None:
    raw, kept = plain_folder(tmp_path / "raw"), tmp_path / "kept"
    (raw / "good/000.png").write_bytes(encoded(noise(0, 64, 64))[:500])
    first, second = (prepare(raw, "alpha", params(), looks=kept) for _ in range(2))
    assert [row["reason"] for row in first.rejected.to_pylist()] == ["truncated"]
    assert contents(first) == contents(second)


def test_looks_of_another_decoder_are_not_taken(
    tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other limits refuse other images; another Pillow may see other pixels."""
    raw, kept = plain_folder(tmp_path / "raw"), tmp_path / "kept"
    prepare(raw, "alpha", params(), looks=kept)
    with pytest.raises(ImageError, match=r"20 x 16 pixels, limits\.min_side is 17"):
        Looks(ImageLimits(min_side=17), kept).at((raw / "good/000.png").read_bytes())
    decoded.clear()
    prepare(raw, "alpha", params(limits={"min_side": 15}), looks=kept)
    assert len(decoded) == 33
    monkeypatch.setattr("PIL.__version__", "1.0")
    prepare(raw, "alpha", params(limits={"min_side": 15}), looks=kept)
    assert len(decoded) == 66


def test_no_damage_to_the_file_changes_what_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [encoded(noise(seed, 40, 40)) for seed in range(3)]

    def seen(looks: Looks) -> list[tuple[object, ...]]:
        return [(*look[:3], look.thumbnail_YX.tobytes()) for look in map(looks.at, images)]

    looks, limits = Looks(ImageLimits(), tmp_path), ImageLimits()
    true = seen(looks)
    looks.keep()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for place in range(0, len(whole), 11):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        assert seen(Looks(limits, tmp_path)) == true
    for length in (0, 4, len(whole) // 2):
        file.write_bytes(whole[:length])
        assert seen(Looks(limits, tmp_path)) == true
    assert "is damaged: its photographs are decoded again" in caplog.text


def test_the_draft_of_another_process_is_left_alone(tmp_path: Path) -> None:
    draft, old = tmp_path / f"{'0' * 64}.parquet.tmp-01234567", tmp_path / f"{'1' * 64}.parquet"
    for path in (draft, old):
        path.touch()
    Looks(ImageLimits(), tmp_path).keep()
    assert (draft.exists(), old.exists(), len(list(tmp_path.iterdir()))) == (True, False, 2)


def test_a_file_that_another_process_removes_counts_as_absent(tmp_path: Path) -> None:
    """A name that is still listed, with nothing behind it."""
    (tmp_path / f"{'0' * 64}.parquet").symlink_to(tmp_path / "gone")
    assert Looks(ImageLimits(), tmp_path).at(encoded(noise(0, 40, 40))).width == 40


def test_without_a_file_nothing_is_kept(tmp_path: Path) -> None:
    prepare(plain_folder(tmp_path / "raw"), "alpha", params())
    shutil.rmtree(tmp_path / "raw")
    assert list(tmp_path.iterdir()) == []


def test_what_decode_refuses_is_refused() -> None:
    with pytest.raises(ImageError, match="no bytes"):
        Looks(ImageLimits()).at(b"")
