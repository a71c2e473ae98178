import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipelines import fetch, prepare
from tests.data.raw_folders import encoded, fill, noise, plain_folder, write
from wtflow.data import looks
from wtflow.data.manifest import Manifest, read_rejected
from wtflow.errors import WTFlowError

REPOSITORY = Path(__file__).parents[2]
PARAMS = """
fetch:
  solar-mono: {package: elpv-dataset, select: mono}
lines:
  solar-mono: {prepare: {}, extract: {}, train: {}, evaluate: {}, register: {}}
  bottles: {prepare: {layout: folder, max_rejected_fraction: 0.2}, extract: {}, train: {}, evaluate: {}, register: {}}
prepare:
  layout: elpv
  test_fraction: 0.25
  calibrate_fraction: 0.15
  salt: wtflow
  group_block: 12
  max_rejected_fraction: 0.0
"""


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)


def test_a_photograph_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, seen = plain_folder(Path("data/raw/bottles")), list[int]()
    decode = looks.decode
    monkeypatch.setattr(looks, "decode", lambda data, limits: seen.append(1) or decode(data, limits))
    prepare.main("bottles")
    first = Manifest.read(Path("data/prepared/bottles/manifest.parquet"))
    assert len(seen) == 33
    shutil.rmtree("data/prepared")
    prepare.main("bottles")
    assert Manifest.read(Path("data/prepared/bottles/manifest.parquet")).digest == first.digest
    assert len(seen) == 33
    fill(raw, ["good/new.png"], first_seed=77)
    prepare.main("bottles")
    assert len(seen) == 34


def test_both_tables_are_written_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    raw = plain_folder(Path("data/raw/bottles"))
    write(raw / "good/cut.png", encoded(noise(77))[:100])
    fill(raw, ["good/000a.png"])  # the bytes of 000.png
    prepare.main("bottles")
    manifest = Manifest.read(Path("data/prepared/bottles/manifest.parquet"))
    rejected = read_rejected(Path("data/prepared/bottles/rejected.parquet"))
    assert (manifest.line, len(manifest.rows())) == ("bottles", 33)
    assert rejected["reason"].to_pylist() == ["duplicate", "truncated"]
    shown = capsys.readouterr()
    assert "bottles: 33 images" in shown.out
    assert "good/cut.png" in shown.out
    assert shown.err == ""  # no bar: it is not a terminal


def test_a_second_run_writes_the_same_bytes() -> None:
    plain_folder(Path("data/raw/bottles"))
    files = [Path("data/prepared/bottles") / name for name in ("manifest.parquet", "rejected.parquet")]
    prepare.main("bottles")
    first = [file.read_bytes() for file in files]
    prepare.main("bottles")
    assert [file.read_bytes() for file in files] == first


def test_a_refused_folder_leaves_the_old_tables() -> None:
    raw = plain_folder(Path("data/raw/bottles"))
    prepare.main("bottles")
    before = Path("data/prepared/bottles/manifest.parquet").read_bytes()
    for image in (raw / "good").iterdir():
        image.write_bytes(b"")
    with pytest.raises(WTFlowError, match="30 of 33 images rejected"):
        prepare.main("bottles")
    assert Path("data/prepared/bottles/manifest.parquet").read_bytes() == before


@pytest.mark.slow
def test_real_solar_cells_from_the_command_line() -> None:
    fetch.main("solar-mono")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.prepare", "solar-mono"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = Manifest.read(Path("data/prepared/solar-mono/manifest.parquet")).rows()
    assert Counter(row["label"] for row in rows) == {"normal": 588, "anomalous": 313, "uncertain": 117 + 56}
    assert Counter(row["split"] for row in rows if row["label"] == "normal") == {
        "train": 350,
        "calibrate": 102,
        "test": 136,
    }
    assert all(row["split"] == "test" for row in rows if row["label"] != "normal")
    assert {(row["width"], row["height"]) for row in rows} == {(300, 300)}
    assert read_rejected(Path("data/prepared/solar-mono/rejected.parquet")).num_rows == 0
