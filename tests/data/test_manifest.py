from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.raw_folders import params
from wtflow.data.manifest import (
    MANIFEST_SCHEMA,
    REJECTED_SCHEMA,
    Manifest,
    cut_from_train,
    read_rejected,
    split_of,
    write_table,
)
from wtflow.errors import DigestError, WTFlowError


def row(number: int, **changes: Any) -> dict[str, Any]:
    plain = {
        "image_id": f"{number:064x}",
        "path": f"good/{number}.png",
        "line": "alpha",
        "group": f"g{number}",
        "split": "train",
        "label": "normal",
        "defect": "",
        "mask_path": None,
        "width": 20,
        "height": 16,
    }
    return plain | changes


ROWS = [row(3), row(1, split="test", label="anomalous", defect="fray", mask_path="masks/ü.png"), row(2, split="test")]
MANIFEST = Manifest.of_rows(ROWS, "alpha", "0123.dir")


def test_rows_are_sorted_by_image_id_and_chosen_by_split() -> None:
    assert [found["path"] for found in MANIFEST.rows()] == ["good/1.png", "good/2.png", "good/3.png"]
    assert [found["path"] for found in MANIFEST.rows("test")] == ["good/1.png", "good/2.png"]
    assert MANIFEST.rows("calibrate") == []
    assert len(MANIFEST.rows("train", "test")) == 3


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new/manifest.parquet"
    MANIFEST.write(path)
    found = Manifest.read(path)
    assert found.table.equals(MANIFEST.table)
    assert found.table.schema.equals(MANIFEST_SCHEMA)
    assert (found.line, found.data_version, found.digest) == ("alpha", "0123.dir", MANIFEST.digest)
    assert [child.name for child in path.parent.iterdir()] == ["manifest.parquet"]


def test_the_same_rows_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path / "a")
    Manifest.of_rows(ROWS[::-1], "alpha", "0123.dir").write(tmp_path / "b")
    Manifest.read(tmp_path / "a").write(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        Manifest.of_rows([*ROWS[:2], row(2, split="calibrate")], "alpha", "0123.dir"),
        Manifest.of_rows(ROWS[:2], "alpha", "0123.dir"),
        Manifest.of_rows(ROWS, "beta", "0123.dir"),
        Manifest.of_rows(ROWS, "alpha", "4567.dir"),
    ],
)
def test_the_digest_covers_rows_line_and_data_version(other: Manifest) -> None:
    assert other.digest != MANIFEST.digest


def test_rows_changed_behind_its_back_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    MANIFEST.write(path)
    table = pq.read_table(path)
    place = table.schema.get_field_index("split")
    changed = table.set_column(place, table.schema.field("split"), pa.array(["train"] * 3))
    pq.write_table(changed, path)
    with pytest.raises(DigestError, match="dvc repro"):
        Manifest.read(path)


@pytest.mark.parametrize("fault", ["missing", "cut", "other columns", "no note"])
def test_a_file_that_is_no_manifest_is_named(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "manifest.parquet"
    MANIFEST.write(path)
    match fault:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-20])
        case "other columns":
            pq.write_table(pa.table({"image_id": ["1"]}), path)
        case "no note":
            pq.write_table(MANIFEST.table, path)
    with pytest.raises(WTFlowError, match=r"manifest\.parquet: .*dvc repro"):
        Manifest.read(path)


def test_a_manifest_may_be_empty(tmp_path: Path) -> None:
    Manifest.of_rows([], "alpha", "x").write(tmp_path / "m")
    assert Manifest.read(tmp_path / "m").rows() == []


def test_null_is_allowed_for_a_mask_only() -> None:
    assert [field.name for field in MANIFEST_SCHEMA if field.nullable] == ["mask_path"]


def test_rejected_round_trip(tmp_path: Path) -> None:
    rows = [{"path": "a.png", "line": "alpha", "reason": "truncated", "detail": "cut off"}]
    table = pa.Table.from_pylist(rows, schema=REJECTED_SCHEMA)
    write_table(table, tmp_path / "rejected.parquet")
    assert read_rejected(tmp_path / "rejected.parquet").equals(table)
    with pytest.raises(WTFlowError, match="other columns"):
        Manifest.read(tmp_path / "rejected.parquet")


def test_the_split_of_a_known_group_never_changes() -> None:
    """Frozen values: another answer here moves images between the splits of every user's data."""
    wtflow = params(test_fraction=0.25, calibrate_fraction=0.15, salt="wtflow")
    found = {group: split_of(group, wtflow) for group in ("block0000", "block0001", "block0002", "view012")}
    assert found == {"block0000": "train", "block0001": "test", "block0002": "calibrate", "view012": "train"}


@settings(max_examples=50)
@given(st.text(max_size=20), st.text(max_size=5), st.floats(0, 0.5), st.floats(0.01, 0.4))
def test_shares_only_move_the_borders(group: str, salt: str, test: float, calibrate: float) -> None:
    less = split_of(group, params(salt=salt, test_fraction=test, calibrate_fraction=calibrate))
    more = split_of(group, params(salt=salt, test_fraction=test + 0.05, calibrate_fraction=calibrate))
    assert less != "test" or more == "test"
    assert cut_from_train(group, params(salt=salt, calibrate_fraction=calibrate)) != "test"


def test_shares_are_met_on_many_groups() -> None:
    quarter = params(test_fraction=0.25, calibrate_fraction=0.15)
    splits = [split_of(f"g{number}", quarter) for number in range(20_000)]
    assert abs(splits.count("test") / 20_000 - 0.25) < 0.01
    assert abs(splits.count("calibrate") / 20_000 - 0.15) < 0.01
    cut = [cut_from_train(f"g{number}", quarter) for number in range(20_000)]
    assert abs(cut.count("calibrate") / 20_000 - 0.15) < 0.01


def test_another_salt_draws_another_split() -> None:
    groups = [f"g{number}" for number in range(100)]
    assert [split_of(g, params(salt="a")) for g in groups] != [split_of(g, params(salt="b")) for g in groups]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "coco"}, "layout"),
        ({"group_pattern": "view"}, "needs a bracket"),
        ({"group_pattern": "(view"}, "not a regular expression"),
        ({"test_fraction": 0.7, "calibrate_fraction": 0.3}, "no group to train on"),
        ({"calibrate_fraction": 0.0}, "calibrate_fraction"),
        ({"group_block": 0}, "group_block"),
        ({"limits": {"max_bytes": 0}}, "max_bytes"),
        ({"test_share": 0.2}, "test_share"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WTFlowError, match=message):
        params(**changes)
