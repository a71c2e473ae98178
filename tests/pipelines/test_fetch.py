import csv
from collections import Counter
from pathlib import Path

import pytest

from pipelines import fetch
from wtflow.data.images import ImageLimits, decode
from wtflow.data.version import data_version
from wtflow.errors import WTFlowError

PARAMS = """
fetch:
  solar-mono: {package: elpv-dataset, select: mono}
  solar-poly: {package: elpv-dataset, select: poly}
lines:
  solar-mono: {prepare: {}, extract: {}, train: {}, evaluate: {}, register: {}}
  solar-poly: {prepare: {}, extract: {}, train: {}, evaluate: {}, register: {}}
  bottles: {prepare: {}, extract: {}, train: {}, evaluate: {}, register: {}}
"""


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)


def labels(line: str) -> list[dict[str, str]]:
    with Path(f"data/raw/{line}/labels.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def small_package(folder: Path, rows: str) -> Path:
    """An installed `elpv_dataset` of our own, ahead of the real one."""
    data = folder / "site/elpv_dataset/data"
    (data / "images").mkdir(parents=True)
    (data.parent / "__init__.py").touch()
    (data / "labels.csv").write_text(rows)
    return data


def test_both_cell_types_of_the_real_package() -> None:
    expected = {
        "solar-mono": {"0.0": 588, "0.3333333333333333": 117, "0.6666666666666666": 56, "1.0": 313},
        "solar-poly": {"0.0": 920, "0.3333333333333333": 178, "0.6666666666666666": 50, "1.0": 402},
    }
    cells: list[int] = []
    for line, counts in expected.items():
        fetch.main(line)
        rows = labels(line)
        assert Counter(row["probability"] for row in rows) == counts
        found = sorted(
            path.relative_to(f"data/raw/{line}").as_posix() for path in Path(f"data/raw/{line}").rglob("*.png")
        )
        assert found == sorted(row["path"] for row in rows)
        cells += [int(row["cell"]) for row in rows]
        first = Path(f"data/raw/{line}") / rows[0]["path"]
        assert decode(first.read_bytes(), ImageLimits()).size == (300, 300)
        # cell0001.png is cell 0: the place in the whole data set, not in the line
        assert all(int(row["path"][-8:-4]) == int(row["cell"]) + 1 for row in rows)
    assert sorted(cells) == list(range(2624))


def test_fetching_again_replaces_everything() -> None:
    fetch.main("solar-mono")
    first = data_version(Path("data/raw/solar-mono"))
    Path("data/raw/solar-mono/images/cell9999.png").write_bytes(b"stale")
    Path("data/raw/solar-mono/labels.csv").write_text("stale")
    fetch.main("solar-mono")
    assert data_version(Path("data/raw/solar-mono")) == first
    assert [path.name for path in Path("data/raw").iterdir()] == ["solar-mono"]


def test_a_line_without_source_says_how_to_bring_images() -> None:
    with pytest.raises(WTFlowError, match="dvc add data/raw/bottles"):
        fetch.main("bottles")
    assert not Path("data").exists()


def test_wrong_settings_are_named() -> None:
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("select: mono", "select: amorphous"))
    with pytest.raises(WTFlowError, match=r"fetch\.solar-mono\.select"):
        fetch.main("solar-mono")


@pytest.mark.parametrize("rows", ["images/a.png 0.0\n", "images/a.png 0.0 mono\nimages/b.png 1.0 mono\n"])
def test_a_damaged_package_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str) -> None:
    data = small_package(tmp_path, rows)
    (data / "images/a.png").write_bytes(b"a")
    monkeypatch.syspath_prepend(data.parents[1])
    kept = Path("data/raw/solar-mono/kept.png")
    kept.parent.mkdir(parents=True)
    kept.touch()
    with pytest.raises(WTFlowError, match="Install the package anew"):
        fetch.main("solar-mono")
    assert [path.name for path in Path("data/raw").rglob("*")] == ["solar-mono", "kept.png"]


def test_a_place_that_is_no_folder_is_refused() -> None:
    raw = Path("data/raw/solar-mono")
    raw.parent.mkdir(parents=True)
    raw.symlink_to("/nowhere/solar-mono")
    with pytest.raises(WTFlowError, match=r"data/raw/solar-mono: has to be a folder, or absent"):
        fetch.main("solar-mono")


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(WTFlowError, match="pip install elpv-dataset"):
        fetch.main("solar-mono")


@pytest.mark.parametrize(
    "source", ["{}", "{package: elpv-dataset}", "{package: elpv-dataset, select: mono, url: 's3://b'}"]
)
def test_a_line_has_one_source(source: str) -> None:
    Path("params.yaml").write_text(PARAMS.replace("{package: elpv-dataset, select: mono}", source))
    with pytest.raises(WTFlowError, match=r"fetch\.solar-mono.*either package and select, or url: s3://bucket/prefix"):
        fetch.main("solar-mono")
