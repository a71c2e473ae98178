from io import StringIO

from rich.console import Console

from pipelines.adapters.ray_fleet import Ended, News
from pipelines.fleet_table import COLUMNS, FleetTable


def cells(table: FleetTable) -> list[list[str]]:
    """What each row shows."""
    return [list(row) for row in zip(*(column.cells for column in table.table().columns), strict=True)]


def test_a_row_follows_its_line() -> None:
    table = FleetTable(["a", "b", "c"], Console(file=StringIO()))
    table.tell([News("a", "node-1", 0, 10, None, 0.0, None), News("b", "node-2", 4, 10, 0.25, 8.0, 81.7)])
    waiting = ["waiting", *[""] * (len(COLUMNS) - 2)]
    assert cells(table) == [
        ["a", "training", "node-1", "0/10", "", "", ""],
        ["b", "training", "node-2", "4/10", "82", "0.2500", "12 s"],
        ["c", *waiting],
    ]
    table.end(Ended("b", 20.0, "run", "0" * 64))
    table.end(Ended("a", 1.0, error="no such level\nsee there"))
    table.tell([News("b", "node-2", 10, 10, 0.2, 19.0, 90.0)])  # overtaken by its own end
    assert [row[1] for row in cells(table)] == ["failed", "trained", "waiting"]
    assert [row[-1] for row in cells(table)] == ["", "", ""]


def test_a_line_that_is_begun_again_starts_over() -> None:
    table = FleetTable(["a"], Console(file=StringIO()))
    table.tell([News("a", "node-1", 7, 10, 0.5, 3.0, 40.0), News("a", "node-2", 0, 10, None, 0.0, None)])
    assert cells(table) == [["a", "training", "node-2", "0/10", "", "", ""]]


def test_without_a_terminal_starts_and_ends_are_printed() -> None:
    printed = StringIO()
    with FleetTable(["a", "b"], Console(file=printed, width=40)) as table:
        table.tell([News("a", "node-1", 0, 10, None, 0.0, None), News("a", "node-1", 1, 10, 0.5, 1.0, 80.0)])
        table.end(Ended("a", 2.5, "run", "abc" * 20))
        table.end(Ended("b", 0.5, error="first\nthe reason"))
    assert printed.getvalue().splitlines() == [
        "train a: started on node node-1",
        "train a: trained in 2.5 s, bundle abcabcabcabc; 1 lines left",
        "train b: failed in 0.5 s, the reason; 0 lines left",
    ]


def test_a_terminal_gets_the_table() -> None:
    printed = StringIO()
    with FleetTable(["line-a"], Console(file=printed, width=100, force_terminal=True)) as table:
        table.end(Ended("line-a", 2.5, "run", "0" * 64))
    assert "1 trained" in printed.getvalue()
    assert "trained in 2.5 s" not in printed.getvalue()
