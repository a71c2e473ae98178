import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipelines import fetch, prepare
from pipelines.false_alarms import holds
from tests.data.raw_folders import encoded, fill, noise, params, plain_folder, write
from wtflow.data import looks
from wtflow.data.manifest import Manifest, read_rejected
from wtflow.data.prepare import prepare as prepare_raw
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


ASKED = "train: {{epochs: 3, calibration: {{target_fpr: {}, pixel_quantile: 0.999}}}}\n"


def told(line: str, train: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the stage prints with this section `train`, on one line."""
    Path("params.yaml").write_text(PARAMS + train)
    prepare.main(line)
    return " ".join(capsys.readouterr().out.split())


def test_too_few_to_calibrate_are_told_before_training_stops(capsys: pytest.CaptureFixture[str]) -> None:
    plain_folder(Path("data/raw/bottles"), good=90)
    rows = Manifest.read(_prepared("bottles")).rows("calibrate")
    assert not holds(len(rows), 0.05)
    said = told("bottles", ASKED.format(0.05), capsys)
    assert f"bottles: training will stop: there are {len(rows)} of the 19 calibration images that a rate of 5 %" in said
    named = re.search(r"calibrate_fraction to (0\.\d+), which leaves (\d+) to calibrate and (\d+) to train", said)
    assert named
    for fraction, enough in ((float(named[1]), True), (float(named[1]) - 0.01, False)):
        Path("params.yaml").write_text(PARAMS.replace("calibrate_fraction: 0.15", f"calibrate_fraction: {fraction:g}"))
        manifest = Manifest.read(_prepared("bottles"))
        assert holds(len(manifest.rows("calibrate")), 0.05) == enough
        if enough:
            assert [len(manifest.rows(split)) for split in ("calibrate", "train")] == [int(named[2]), int(named[3])]


def _prepared(line: str) -> Path:
    prepare.main(line)
    return Path(f"data/prepared/{line}/manifest.parquet")


def test_enough_to_calibrate_need_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    plain_folder(Path("data/raw/bottles"))
    assert "training will stop" not in told("bottles", ASKED.format(0.34), capsys)


def test_where_no_fraction_will_do_more_images_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    plain_folder(Path("data/raw/bottles"))
    said = told("bottles", ASKED.format(0.01), capsys)
    rows = Manifest.read(Path("data/prepared/bottles/manifest.parquet")).rows("train", "calibrate")
    assert f"of the 99 calibration images that a rate of 1 % needs. Bring more normal images ({len(rows)} are" in said


def test_the_fraction_is_of_what_the_layout_lets_be_drawn(tmp_path: Path) -> None:
    fill(tmp_path / "ad", [f"train/good/{number:03d}.png" for number in range(60)])
    fill(tmp_path / "ad", ["test/good/0.png"], first_seed=500)
    shutil.copytree(tmp_path / "ad", tmp_path / "loco")
    fill(tmp_path / "loco", ["validation/good/0.png"], first_seed=600)
    write(tmp_path / "loco/defects_config.json", b"[]")
    (tmp_path / "loco/ground_truth").mkdir()
    few = params(layout="mvtec_ad", calibrate_fraction=0.1)
    found = prepare.enough_to_calibrate(prepare_raw(tmp_path / "ad", "ad", few), few, 0.05)
    assert found is not None
    then = params(layout="mvtec_ad", calibrate_fraction=found[0])
    assert len(prepare_raw(tmp_path / "ad", "ad", then).manifest.rows("calibrate")) == found[1]["calibrate"] >= 19
    own = params(layout="mvtec_loco", calibrate_fraction=0.1)  # its validation images calibrate, whatever the fraction
    assert prepare.enough_to_calibrate(prepare_raw(tmp_path / "loco", "loco", own), own, 0.05) is None


@pytest.mark.parametrize(
    "train",
    [
        "",
        "train: {calibration: [1]}\n",
        "train: {calibration: {}, nonsense: 1}\n",
        "train: {calibration: 3}\n",
        ASKED.format(7),
        ASKED.format("{}"),
        ASKED.format(0.01),
    ],
)
def test_what_train_says_changes_nothing_that_is_written(train: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain_folder(Path("data/raw/bottles"))
    prepare.main("bottles")
    files = [*Path("data/prepared/bottles").iterdir()]
    before = [file.read_bytes() for file in files]
    told("bottles", train, capsys)
    assert [file.read_bytes() for file in files] == before


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
