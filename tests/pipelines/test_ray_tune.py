import zipfile
from pathlib import Path

import pytest

from pipelines.adapters.ray_tune import Note, alone, fill_gaps, put_back
from pipelines.search_report import _cause
from wtflow.errors import WTFlowError


def checkpoint(folder: Path, content: str) -> None:
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(content)


def test_the_newest_checkpoint_stands_in_for_those_that_it_replaced(tmp_path: Path) -> None:
    checkpoint(tmp_path / "behind/checkpoint_000001", "second")
    checkpoint(tmp_path / "behind/checkpoint_000003", "fourth")
    checkpoint(tmp_path / "behind/checkpoint_000002.tmp-0123abcd", "half of a copy")
    checkpoint(tmp_path / "first/checkpoint_000000", "first")
    (tmp_path / "begun").mkdir()
    (tmp_path / "tuner.pkl").write_text("")
    fill_gaps(tmp_path)
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.glob("*/*/state.json")}
    assert found == {
        "behind/checkpoint_000000/state.json": "fourth",
        "behind/checkpoint_000001/state.json": "second",
        "behind/checkpoint_000002.tmp-0123abcd/state.json": "half of a copy",
        "behind/checkpoint_000002/state.json": "fourth",
        "behind/checkpoint_000003/state.json": "fourth",
        "first/checkpoint_000000/state.json": "first",
    }


def test_the_noted_state_replaces_what_a_killed_driver_left(tmp_path: Path) -> None:
    assert not put_back(tmp_path)
    with zipfile.ZipFile(tmp_path / Note.NAME, "w") as note:
        note.writestr("experiment_state-1.json", "whole")
    for name in ("experiment_state-1.json", "experiment_state-2.json", "tuner.pkl", "spent.json"):
        (tmp_path / name).write_text("half")
    checkpoint(tmp_path / "first/checkpoint_000000", "first")
    assert put_back(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix in (".json", ".pkl")} == {
        "experiment_state-1.json": "whole",
        "tuner.pkl": "half",
        "spent.json": "half",
    }
    assert (tmp_path / "first/checkpoint_000000").exists()


def test_a_search_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "tune/tiny-0"
    second = pytest.raises(WTFlowError, match="search tiny-0 is under way in another process")
    with alone(path), second, alone(path):
        pass
    with alone(path):
        pass


@pytest.mark.parametrize(
    "failure",
    ["a score is not finite\nat epoch 3", "\x1b[36mray::Trial.restore()\x1b[39m\n  File x\na score is not finite"],
)
def test_the_table_says_why_a_trial_failed(failure: str) -> None:
    assert _cause(failure) == "a score is not finite"
