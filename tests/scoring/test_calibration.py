import json

import numpy as np
import pytest

from wtflow.errors import WTFlowError
from wtflow.scoring.calibration import Calibration, CalibrationParams, calibrate, conformal_rank

PARAMS = CalibrationParams(target_fpr=0.05, pixel_quantile=0.9)


def calibration(scores: np.ndarray, target_fpr: float) -> Calibration:
    return Calibration(np.sort(scores.astype(np.float64)), target_fpr, 1.0)


@pytest.mark.parametrize(("count", "target_fpr"), [(30, 0.1), (102, 0.05), (19, 0.05), (25, 0.3)])
def test_false_alarms_stay_below_the_target_and_not_far(count: int, target_fpr: float) -> None:
    """Over 10,000 draws of calibration set and new normal: a - 1/(n+1) < P(flagged) <= a, P(p <= a) the same."""
    rng = np.random.default_rng(0)
    draws = 10_000
    scores = rng.standard_gamma(2.0, (draws, count + 1))
    flagged, small = 0, 0
    for row in scores:
        one = calibration(row[:-1], target_fpr)
        flagged += row[-1] > one.threshold
        small += one.p_value(row[-1]) <= target_fpr
    noise = 3 * np.sqrt(target_fpr * (1 - target_fpr) / draws)
    assert flagged == small
    assert target_fpr - 1 / (count + 1) - noise < flagged / draws <= target_fpr + noise


@pytest.mark.parametrize(
    ("count", "target_fpr", "rank"),
    [
        (19, 0.05, 19),  # (n + 1)(1 - a) = 19 exactly: the highest score
        (99, 0.05, 95),
        (20, 0.05, 20),  # 19.95
        (9, 0.1, 9),
        (99, 0.1, 90),
        (999, 0.001, 999),
        (1, 0.5, 1),
        (102, 0.05, 98),  # 97.85
    ],
)
def test_rank(count: int, target_fpr: float, rank: int) -> None:
    assert conformal_rank(count, target_fpr) == rank


@pytest.mark.parametrize(("target_fpr", "needed"), [(0.05, 19), (0.1, 9), (0.001, 999), (0.3, 3)])
def test_too_few_images_are_an_error_that_names_the_need(target_fpr: float, needed: int) -> None:
    assert conformal_rank(needed, target_fpr) == needed
    with pytest.raises(WTFlowError, match=f"needs at least {needed} calibration images, not {needed - 1}"):
        conformal_rank(needed - 1, target_fpr)
    with pytest.raises(WTFlowError, match="at least"):
        calibrate(
            np.arange(needed - 1.0),
            np.ones(4, np.float32),
            CalibrationParams(target_fpr=target_fpr, pixel_quantile=0.9),
        )


@pytest.mark.parametrize("count", [19, 20, 39, 57, 99, 100])
@pytest.mark.parametrize("target_fpr", [0.05, 0.1, 0.2, 0.25])
def test_p_value_at_most_the_target_is_the_same_as_flagged(count: int, target_fpr: float) -> None:
    """Also at ties, at the scores themselves and one step of the floats beside them."""
    scores = np.round(np.random.default_rng(count).standard_normal(count), 1)
    one = calibration(scores, target_fpr)
    for score in [*scores, *np.nextafter(scores, np.inf), *np.nextafter(scores, -np.inf), -9.0, 9.0]:
        assert (one.p_value(score) <= target_fpr) == (score > one.threshold)


def test_p_values_by_hand() -> None:
    one = calibration(np.array([3.0, 1.0, 2.0, 2.0]), 0.5)
    wanted = {0.0: 5 / 5, 1.0: 5 / 5, 1.5: 4 / 5, 2.0: 4 / 5, 2.5: 2 / 5, 3.0: 2 / 5, 9.0: 1 / 5}
    assert one.p_value(list(wanted)).tolist() == list(wanted.values())


def test_json_keeps_every_bit() -> None:
    scores = np.random.default_rng(0).standard_normal(50)
    one = calibrate(scores, np.linspace(0, 1, 11, dtype=np.float32), PARAMS)
    again = Calibration.from_json(json.loads(json.dumps(one.to_json())))
    assert np.array_equal(again.scores, np.sort(scores))
    assert (again.threshold, again.target_fpr, again.pixel_threshold) == (
        one.threshold,
        one.target_fpr,
        one.pixel_threshold,
    )
    assert one.pixel_threshold == pytest.approx(0.9, abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_of_a_diverged_field_are_refused(bad: float) -> None:
    with pytest.raises(WTFlowError, match="not finite"):
        calibrate(np.array([*range(30), bad]), np.ones(4, np.float32), PARAMS)
