import os
from pathlib import Path

import pytest

from tests.data.raw_folders import encoded, fill, noise, write
from wtflow.artefact import sha256_file
from wtflow.data.images import ImageLimits
from wtflow.data.scan import Rejection, Scanned, scan
from wtflow.data.sources.source_image import SourceImage
from wtflow.data.version import md5_bytes

LIMITS = ImageLimits(max_bytes=100_000)


def source(path: str, group: str = "g", mask_path: str | None = None) -> SourceImage:
    return SourceImage(path, group, None, "normal", "", mask_path)


def one(raw: Path, image: SourceImage) -> Scanned | Rejection:
    (outcome,) = scan(raw, [image], LIMITS)
    return outcome


def reason(outcome: Scanned | Rejection) -> str:
    rejection = outcome.fault if isinstance(outcome, Scanned) else outcome
    assert rejection is not None
    assert rejection.detail
    return rejection.reason


def test_a_sound_image(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png", "m.png"])
    found = one(tmp_path, source("a.png", mask_path="m.png"))
    assert isinstance(found, Scanned)
    assert (found.image_id, found.width, found.height) == (sha256_file(tmp_path / "a.png"), 20, 16)
    assert found.fault is None
    assert found.md5s == {name: md5_bytes((tmp_path / name).read_bytes()) for name in ("a.png", "m.png")}


def test_size_is_that_of_the_upright_image(tmp_path: Path) -> None:
    exif = noise(0).getexif()
    exif[0x0112] = 6
    write(tmp_path / "a.jpg", encoded(noise(0), "JPEG", exif=exif))
    found = one(tmp_path, source("a.jpg"))
    assert isinstance(found, Scanned)
    assert (found.width, found.height) == (16, 20)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"not an image", "not_an_image"),
        (encoded(noise(0, 64, 64))[:500], "truncated"),
        (encoded(noise(0, 10, 64)), "too_small"),
        (encoded(noise(0, 300, 300), "BMP"), "too_many_bytes"),
    ],
)
def test_what_decode_refuses_is_rejected_for_its_reason(tmp_path: Path, data: bytes, expected: str) -> None:
    write(tmp_path / "a.png", data)
    assert reason(one(tmp_path, source("a.png"))) == expected


@pytest.mark.timeout(20)  # a FIFO that is opened waits for ever
def test_what_is_no_file_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    for path in ("nowhere.png", "folder.png", "fifo.png", "circle.png", "nul\0.png", "x" * 300, "", "odd\udcff.png"):
        assert reason(one(tmp_path, source(path))) == "unreadable", path


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    fill(tmp_path, ["secret.png", "raw-other/b.png", "raw/good/in.png"])
    raw = tmp_path / "raw"
    (raw / "out.png").symlink_to(tmp_path / "secret.png")
    (raw / "folder").symlink_to(tmp_path / "raw-other")
    (raw / "in.png").symlink_to("good/in.png")
    for path in ("out.png", "folder/b.png", "../secret.png", "../raw-other/b.png", str(tmp_path / "secret.png")):
        assert reason(one(raw, source(path))) == "outside", path
    assert isinstance(one(raw, source("in.png")), Scanned)
    assert reason(one(raw, source("in.png", mask_path="out.png"))) == "bad_mask"


def test_the_raw_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    fill(tmp_path, ["store/a.png"])
    (tmp_path / "raw").symlink_to("store")
    assert isinstance(one(tmp_path / "raw", source("a.png")), Scanned)


def test_links_into_a_dvc_cache_are_followed(tmp_path: Path) -> None:
    cached = f"cache/files/md5/ab/{'0' * 30}"
    fill(tmp_path, [cached, "cache/files/md5/ab/other"])
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.png").symlink_to(tmp_path / cached)
    (tmp_path / "raw/b.png").symlink_to(tmp_path / "cache/files/md5/ab/other")
    assert isinstance(one(tmp_path / "raw", source("a.png")), Scanned)
    assert reason(one(tmp_path / "raw", source("b.png"))) == "outside"


def test_masks_have_to_be_there_whole_and_of_the_image_s_size(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png"])
    write(tmp_path / "large.png", encoded(noise(1, 21, 16)))
    write(tmp_path / "cut.png", encoded(noise(1))[:200])
    write(tmp_path / "empty mask.png", encoded(noise(1).convert("L").point(lambda level: 0)))
    for mask in ("large.png", "cut.png", "missing.png"):
        outcome = one(tmp_path, source("a.png", mask_path=mask))
        assert reason(outcome) == "bad_mask"
        assert isinstance(outcome, Scanned)
        assert outcome.fault is not None
        assert mask in outcome.fault.detail
    sound = one(tmp_path, source("a.png", mask_path="empty mask.png"))
    assert isinstance(sound, Scanned)
    assert sound.fault is None


def test_bytes_that_are_cut_at_the_limit_are_no_version_of_a_mask(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png"])
    write(tmp_path / "m.png", bytes(LIMITS.max_bytes + 10))
    outcome = one(tmp_path, source("a.png", mask_path="m.png"))
    assert isinstance(outcome, Scanned)
    assert reason(outcome) == "bad_mask"
    assert set(outcome.md5s) == {"a.png"}


def test_a_mask_whose_name_is_too_long_is_a_bad_one(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png"])
    assert reason(one(tmp_path, source("a.png", mask_path="x" * 300))) == "bad_mask"


def test_a_mask_whose_name_is_not_utf_8_is_named_all_the_same(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png", "m/0.png"])
    (tmp_path / "m/0.png").rename(tmp_path / "m" / os.fsdecode(b"\xff.png"))
    outcome = one(tmp_path, source("a.png", mask_path="m"))
    assert reason(outcome) == "bad_mask"
    assert isinstance(outcome, Scanned)
    assert outcome.fault is not None
    outcome.fault.detail.encode()


def test_a_name_without_group_is_of_no_use(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png"])
    assert reason(one(tmp_path, source("a.png", group=""))) == "no_group"


def test_outcomes_keep_the_order(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(50)]
    fill(tmp_path, names[::2])
    outcomes = list(scan(tmp_path, [source(name) for name in names], LIMITS))
    paths = [one.source.path if isinstance(one, Scanned) else one.path for one in outcomes]
    assert paths == names
    assert [isinstance(one, Scanned) for one in outcomes] == [True, False] * 25
