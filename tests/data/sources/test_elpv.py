from pathlib import Path

import pytest

from tests.data.raw_folders import fill, params, write
from wtflow.data.prepare import prepare
from wtflow.data.sources import elpv
from wtflow.data.sources.source_image import SourceImage
from wtflow.errors import WTFlowError

HEAD = "path,probability,cell\n"


def found(raw: Path, labels: str, group_block: int = 30) -> list[SourceImage]:
    write(raw / "labels.csv", labels.encode())
    return list(elpv.images(raw, params(layout="elpv", group_block=group_block)))


def test_probabilities_become_labels(tmp_path: Path) -> None:
    rows = ["a.png,0.0,0", "b.png,0.3333333333333333,1", "c.png,0.6666666666666666,2", "d.png,1.0,3"]
    images = found(tmp_path, HEAD + "\n".join(rows))
    assert [(image.path, image.label, image.defect) for image in images] == [
        ("a.png", "normal", ""),
        ("b.png", "uncertain", "probability 1/3"),
        ("c.png", "uncertain", "probability 2/3"),
        ("d.png", "anomalous", "defective"),
    ]
    assert {(image.split, image.mask_path) for image in images} == {(None, None)}


def test_blocks_count_all_cells_of_the_data_set(tmp_path: Path) -> None:
    images = found(tmp_path, HEAD + "a.png,0,0\nb.png,0,19\nc.png,0,20\nd.png,0,2623\n", group_block=20)
    assert [image.group for image in images] == ["block0000", "block0000", "block0001", "block0131"]


@pytest.mark.parametrize(
    "row",
    [
        "../a.png,0,1",
        "/a.png,0,1",
        ",0,1",
        "a.png,0.5,1",
        "a.png,nan,1",
        "a.png,0,x",
        "a.png,0,1.5",
        "a.png,0",
        "a.png,0,-1",
        "a.png,,1",
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str) -> None:
    with pytest.raises(WTFlowError, match=r"labels\.csv:3: "):
        found(tmp_path, f"{HEAD}ok.png,0,0\n{row}\n")


def test_paths_may_begin_with_the_folder_itself(tmp_path: Path) -> None:
    fill(tmp_path, [f"images/{number:02d}.png" for number in range(40)])
    rows = [f"./images//{number:02d}.png,0,{number}" for number in range(40)]
    write(tmp_path / "labels.csv", (HEAD + "\n".join(rows)).encode())
    prepared = prepare(tmp_path, "line", params(layout="elpv"))
    assert (prepared.manifest.table.num_rows, prepared.rejected.num_rows) == (40, 0)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WTFlowError, match=r"labels\.csv: not there"):
        list(elpv.images(tmp_path, params(layout="elpv")))
    with pytest.raises(WTFlowError, match="first line has to be path,probability,cell"):
        found(tmp_path, "path,probability\na.png,0\n")
    write(tmp_path / "labels.csv", HEAD.encode() + b"\xff\xfe,0,1\n")
    with pytest.raises(WTFlowError, match="not a CSV file in UTF-8"):
        list(elpv.images(tmp_path, params(layout="elpv")))
