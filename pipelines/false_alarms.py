"""Which rate of false alarms so many calibration images can hold."""

from bisect import bisect_left

from wtflow.errors import WTFlowError
from wtflow.scoring.calibration import conformal_rank

MOST_IMAGES = 10**9


def holds(images: int, rate: float) -> bool:
    """Whether `images` to calibrate can hold a false-alarm `rate`, as `train` decides it."""
    try:
        conformal_rank(images, rate)
    except WTFlowError:
        return False
    return True


def images_needed(rate: float) -> int:
    """The fewest calibration images that hold `rate`."""
    return bisect_left(range(MOST_IMAGES), True, key=lambda images: holds(images, rate))
