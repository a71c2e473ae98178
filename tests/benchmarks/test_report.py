from benchmarks.report import SHOWN, _cell, _tables


def test_rows_of_one_kind_are_in_one_table() -> None:
    """A row may lack columns; one that lacks some and has others begins a new table."""
    rows = [
        {"what": "a", "ms": 1.0},
        {"what": "b", "ms": 2.0, "ratio": 0.5},
        {"what": "c", "ms": 3.0},
        {"what": "d", "loss": 1.0},
    ]
    tables = _tables("name", rows)
    assert [[column.header for column in table.columns] for table in tables] == [
        ["what", "ms", "ratio"],
        ["what", "loss"],
    ]
    assert [table.row_count for table in tables] == [3, 1]
    assert list(tables[0].columns[2].cells) == ["", "0.5000", ""]


def test_a_long_list_is_shortened_for_the_eye() -> None:
    assert _cell([0.5] * SHOWN) == ", ".join(["0.5000"] * SHOWN)
    assert _cell([0.25] + [0.5] * SHOWN + [0.75]) == "0.2500, 0.5000, 0.5000, 0.5000, 0.5000, ..., 0.7500"
