from pathlib import Path

import pytest

from benchmarks.kills import drill


@pytest.mark.slow
def test_extraction_survives_ten_kills_at_random_moments(tmp_path: Path) -> None:
    _, tally = drill(tmp_path, 10)
    assert (tally.kills, tally.damaged, tally.different) == (10, 0, 0)
    assert tally.finished >= 1
    assert len(set(tally.shards)) > 2
