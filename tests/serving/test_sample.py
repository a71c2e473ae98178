import shlex
from pathlib import Path

import pytest

from serving.resolve import Champion
from serving.sample import curl, sample_image
from tests.serving.lines import encoded, picture
from wtflow.data.manifest import Manifest


def champion(sample: str | None = None) -> Champion:
    return Champion("sqlite:///mlflow.db", "line-a", "wtflow-line-a", 1, None, sample)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for name in ("good/000.png", "good/001.PNG", "odd/009.png"):
        path = tmp_path / "raw" / "line-a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(1)))
    (tmp_path / "raw" / "line-a" / "LICENSE.txt").write_text("not an image")
    return tmp_path / "raw"


def row(path: str, split: str, label: str) -> dict[str, object]:
    return {
        "image_id": path, "path": path, "line": "line-a", "group": path, "split": split, "label": label,
        "defect": "", "mask_path": None, "width": 60, "height": 40,
    }  # fmt: skip


def write_manifest(folder: Path) -> None:
    rows = [
        row("good/000.png", "train", "normal"),
        row("good/001.PNG", "test", "normal"),
        row("gone/000.png", "test", "anomalous"),
        row("odd/009.png", "test", "anomalous"),
    ]
    Manifest.of_rows(rows, "line-a", "0.dir").write(folder / "line-a" / "manifest.parquet")


def test_tag_wins_while_its_file_is_there(raw: Path, tmp_path: Path) -> None:
    tagged = raw / "line-a" / "good" / "001.PNG"
    assert sample_image(champion(str(tagged)), raw, tmp_path) == tagged
    assert sample_image(champion("/nowhere/else.png"), raw, tmp_path) == raw / "line-a" / "good" / "000.png"


def test_anomalous_test_image_before_others(raw: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "prepared")
    assert sample_image(champion(), raw, tmp_path / "prepared") == raw / "line-a" / "odd" / "009.png"


def test_manifest_that_cannot_be_read_is_no_obstacle(raw: Path, tmp_path: Path) -> None:
    broken = tmp_path / "prepared" / "line-a" / "manifest.parquet"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"PAR1 no more")
    assert sample_image(champion(), raw, tmp_path / "prepared") == raw / "line-a" / "good" / "000.png"


def test_no_image_gives_a_placeholder(tmp_path: Path) -> None:
    found = sample_image(champion(), tmp_path / "raw", tmp_path / "prepared")
    assert found is None
    assert "@photo.png" in curl("http://127.0.0.1:8000", "line-a", found)


def test_curl_line_survives_the_shell() -> None:
    words = shlex.split(curl("http://127.0.0.1:8000", "line-a", Path("/data/it's a photo $1.png")))
    assert words[0] == "curl"
    assert words[words.index("--data-binary") + 1] == "@/data/it's a photo $1.png"
    assert words[-1] == "http://127.0.0.1:8000/v1/lines/line-a/score"
