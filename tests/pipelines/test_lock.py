from pathlib import Path
from threading import Thread

import pytest

from pipelines.lock import alone
from wtflow.errors import WTFlowError


def test_one_process_is_inside_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "locks/tiny.lock"
    with alone(path, "busy"), pytest.raises(WTFlowError, match=r"^busy$"), alone(path, "busy"):
        pass
    with alone(path, "busy"):
        pass


def test_without_a_text_it_waits(tmp_path: Path) -> None:
    path, order = tmp_path / "tiny.lock", list[str]()

    def second() -> None:
        with alone(path):
            order.append("second")

    thread = Thread(target=second)
    with alone(path):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
