import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

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


@pytest.mark.parametrize(("count", "target_fpr"), [(30, 0.1), (102, 0.05), (19, 0.05), (25, 0.3)])
def test_the_rate_of_one_calibration_set_follows_its_beta_distribution(count: int, target_fpr: float) -> None:
    """The exact false-alarm rates of 10,000 thresholds against Beta(n + 1 - k, k), by Kolmogorov and Smirnov."""
    scores = np.random.default_rng(1).standard_gamma(2.0, (10_000, count))
    rates = [float(stats.gamma.sf(calibration(row, target_fpr).threshold, 2.0)) for row in scores]
    rank = conformal_rank(count, target_fpr)
    assert stats.kstest(rates, stats.beta(count + 1 - rank, rank).cdf).pvalue > 0.01
    assert stats.kstest(rates, stats.beta(count + 2 - rank, rank).cdf).pvalue < 1e-6


def test_the_band_for_review_holds_the_difference_of_the_rates() -> None:
    """Of normals, review_fpr - target_fpr on average, but for one rank each: (n + 1) a is whole here, so exactly."""
    scores = np.random.default_rng(2).standard_gamma(2.0, (10_000, 40))
    verdicts = np.zeros(3)
    for row in scores:
        one = replace(calibration(row[:-1], 0.05), review_fpr=0.2)
        flagged, review = row[-1] > one.threshold, one.needs_review(row[-1])
        assert not (flagged and review)
        assert (flagged or review) == (one.p_value(row[-1]) <= 0.2)
        verdicts += [flagged, review, not (flagged or review)]
    assert verdicts / 10_000 == pytest.approx([0.05, 0.15, 0.8], abs=0.012)


def test_the_band_is_open_below_and_closed_above() -> None:
    one = replace(calibration(np.arange(1.0, 20.0), 0.1), review_fpr=0.5)  # thresholds 18 and 10
    assert (one.threshold, one.review_threshold) == (18, 10)
    assert [one.needs_review(score) for score in (9, 10, 10.5, 18, 18.5)] == [False, False, True, True, False]


def test_without_a_band_nothing_needs_review_and_the_file_is_the_old_one() -> None:
    one = calibration(np.arange(1.0, 20.0), 0.1)
    assert one.review_threshold is None
    assert not any(one.needs_review(score) for score in (9, 17.5, 18, 99))
    assert set(one.to_json()) == {"scores", "target_fpr", "pixel_threshold", "threshold"}


def test_the_band_survives_the_file() -> None:
    params = CalibrationParams(target_fpr=0.1, review_fpr=0.5, pixel_quantile=0.9)
    one = calibrate(np.arange(1.0, 20.0), np.ones(4, np.float32), params)
    values = json.loads(json.dumps(one.to_json()))
    assert (values["review_fpr"], values["review_threshold"]) == (0.5, 10.0)
    assert Calibration.from_json(values).review_threshold == one.review_threshold == 10.0


@pytest.mark.parametrize("review_fpr", [0.05, 0.01])
def test_a_band_that_is_none_is_refused(review_fpr: float) -> None:
    settings = {"target_fpr": 0.05, "review_fpr": review_fpr, "pixel_quantile": 0.9}
    with pytest.raises(WTFlowError, match=r"must be above target_fpr 0\.05, or null"):
        CalibrationParams.parse(settings, "train.calibration")


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
