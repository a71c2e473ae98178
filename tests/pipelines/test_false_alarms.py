import pytest

from pipelines.false_alarms import holds, images_needed
from wtflow.errors import WTFlowError
from wtflow.scoring.calibration import conformal_rank


@pytest.mark.parametrize(("rate", "needed"), [(0.2, 4), (0.1, 9), (0.05, 19), (0.02, 49), (0.01, 99), (1e-6, 999_999)])
def test_as_many_images_as_training_asks_for(rate: float, needed: int) -> None:
    assert images_needed(rate) == needed
    assert holds(needed, rate)
    assert not holds(needed - 1, rate)
    with pytest.raises(WTFlowError, match=f"needs at least {needed} calibration images"):
        conformal_rank(needed - 1, rate)
