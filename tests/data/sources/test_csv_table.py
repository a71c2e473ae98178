from pathlib import Path

import pytest

from tests.data.raw_folders import encoded, fill, noise, params, write
from wtflow.data.prepare import prepare
from wtflow.data.sources import csv_table
from wtflow.data.sources.source_image import SourceImage
from wtflow.errors import WTFlowError

CSV = params(layout="csv")


def found(raw: Path, table: str) -> list[SourceImage]:
    write(raw / "images.csv", table.encode())
    return list(csv_table.images(raw, CSV))


def test_columns_say_all_there_is(tmp_path: Path) -> None:
    table = (
        "split,path,label,group,mask,defect\r\n"
        "train,a.png,normal,lot 1,,\r\n"
        ',"tür, links.png",normal,,,\r\n'
        "test,b/c.png,anomalous,,masks/c.png,dent\r\n"
        ",d.png,uncertain,lot 2,,"
    )
    assert found(tmp_path, table) == [
        SourceImage("a.png", "lot 1", "train", "normal", "", None),
        SourceImage("tür, links.png", "tür, links", None, "normal", "", None),
        SourceImage("b/c.png", "b/c", "test", "anomalous", "dent", "masks/c.png"),
        SourceImage("d.png", "lot 2", None, "uncertain", "", None),
    ]


def test_two_columns_are_enough_and_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    assert found(tmp_path, "\ufeffpath,label\na.png,anomalous\n") == [
        SourceImage("a.png", "a", None, "anomalous", "defective", None)
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("b.png,bad,,", "label has to be one of normal, anomalous, uncertain, found 'bad'"),
        ("b.png,normal,dev,", "split has to be one of train, calibrate, test, found 'dev'"),
        ("b.png,anomalous,train,", "anomalous images are test images"),
        ("b.png,normal,,m.png", "a normal image has neither mask nor defect"),
        ("a.png,normal,,", r"path is 'a.png', as in .*images\.csv:2"),
        (",normal,,", "path is ''"),
        ("./a.png,normal,,", r"path is 'a.png', as in .*images\.csv:2"),
        ("/b.png,normal,,", r"path is '/b.png'\. Name a path below the folder of images\.csv"),
        ("./,normal,,", r"path is './'\. Name a path below"),
        ("b.png,anomalous,,/m.png", r"mask is '/m.png'\. Name a path below"),
        ("b.png,anomalous,,.", r"mask is '.'\. Name a path below"),
        ("../b.png,normal,,", r"path is '\.\./b\.png'\. Name a path below .*, without '\.\.' in it"),
        ("b.png,anomalous,,m/../m.png", r"mask is 'm/\.\./m\.png'\. Name a path below"),
        ("b.png,normal,,,,", "more fields than columns"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(WTFlowError, match=rf"images\.csv:3: {message}"):
        found(tmp_path, f"path,label,split,mask\na.png,normal,,\n{row}\n")


@pytest.mark.parametrize("header", ["path,group", "path,label,labels", "path,label,path", ""])
def test_a_wrong_header_is_named(tmp_path: Path, header: str) -> None:
    with pytest.raises(WTFlowError, match=r"has to be path,label \(and may have group, mask, defect, split\), found"):
        found(tmp_path, f"{header}\na.png,normal,x\n")


@pytest.mark.parametrize(("sign", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_another_separator_is_named(tmp_path: Path, sign: str, name: str) -> None:
    with pytest.raises(WTFlowError, match=rf"found .*\. It is separated by {name}: use commas\.$"):
        found(tmp_path, f"path{sign}label\na.png{sign}normal\n")


def test_a_split_of_ones_own_is_kept_and_the_rest_is_drawn(tmp_path: Path) -> None:
    names = [f"{number:02d}.png" for number in range(30)]
    fill(tmp_path, names)
    fill(tmp_path, ["bad.png"], first_seed=100)
    write(tmp_path / "regions/0.png", encoded(noise(200)))
    splits = {"00.png": "train", "01.png": "calibrate", "02.png": "test"}
    rows = [f"{name},normal,{splits.get(name, '')}," for name in names]
    write(tmp_path / "images.csv", "\n".join(["path,label,split,mask", *rows, "bad.png,anomalous,,regions"]).encode())
    prepared = prepare(tmp_path, "line", CSV)
    kept = {row["path"]: row["split"] for row in prepared.manifest.rows()}
    assert {name: kept[name] for name in splits} == splits
    assert {kept[name] for name in names[3:]} == {"train", "calibrate", "test"}
    assert prepared.rejected.num_rows == 0


def test_paths_may_begin_with_the_folder_itself(tmp_path: Path) -> None:
    """As `find .` lists them."""
    fill(tmp_path, [*(f"img/{number:02d}.png" for number in range(30)), "bad.png"])
    write(tmp_path / "masks/bad.png", encoded(noise(200)))
    rows = [*(f"./img//{number:02d}.png,normal," for number in range(30)), "./bad.png,anomalous,./masks//bad.png"]
    write(tmp_path / "images.csv", "\n".join(["path,label,mask", *rows]).encode())
    prepared = prepare(tmp_path, "line", CSV)
    assert prepared.rejected.num_rows == 0
    found = {row["path"]: (row["group"], row["mask_path"]) for row in prepared.manifest.rows()}
    assert found["img/00.png"] == ("img/00", None)
    assert found["bad.png"] == ("bad", "masks/bad.png")


def test_regions_may_lie_in_folders_of_their_own(tmp_path: Path) -> None:
    names = [f"good/{number:02d}.png" for number in range(30)]
    fill(tmp_path, [*names, "bad.png", "regions/0/dent/0.png", "regions/0/hole/deep/0.png", "regions/1/0.png"])
    rows = [*(f"{name},normal," for name in names), "bad.png,anomalous,regions/0"]
    write(tmp_path / "images.csv", "\n".join(["path,label,mask", *rows]).encode())
    rejected = prepare(tmp_path, "line", CSV).rejected.to_pylist()
    assert [(row["path"], row["reason"]) for row in rejected] == [("regions/1/0.png", "not_in_layout")]
