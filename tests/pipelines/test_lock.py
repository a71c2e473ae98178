from pathlib import Path

import pytest

from pipelines.lock import alone
from wtflow.errors import WTFlowError


def test_one_process_is_inside_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "locks/tiny.lock"
    with alone(path, "busy"), pytest.raises(WTFlowError, match=r"^busy$"), alone(path, "busy"):
        pass
    with alone(path, "busy"):
        pass
