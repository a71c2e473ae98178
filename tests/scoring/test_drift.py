import io
import json

import numpy as np
import pytest

from wtflow.errors import WTFlowError
from wtflow.scoring.calibration import Calibration
from wtflow.scoring.drift import batches, least_replies, read_scores

DIGEST = "d" * 64


def calibration(scores: np.ndarray, target_fpr: float = 0.05) -> Calibration:
    return Calibration(np.sort(scores), target_fpr, 0.0)


def test_the_newest_batch_is_whole_and_none_is_lost() -> None:
    scores = list(np.random.default_rng(0).normal(size=450))
    found = batches(calibration(np.random.default_rng(1).normal(size=60)), scores, 200, 0.001)
    assert [(batch.first, batch.images) for batch in found] == [(1, 50), (51, 200), (251, 200)]
    assert [(one.first, one.images) for one in batches(calibration(np.arange(60.0)), scores, 900, 0.001)] == [(1, 450)]
    assert len(batches(calibration(np.arange(60.0)), scores, 450, 0.001)) == 1
    assert batches(calibration(np.arange(60.0)), [], 200, 0.001) == []


def test_figures_of_a_batch() -> None:
    """Calibration 1 .. 19: the threshold for 5 % is 19."""
    (batch,) = batches(calibration(np.arange(1.0, 20.0)), [5.0, 10.0, 10.0, 19.0, 20.0], 5, 0.001)
    assert batch.flagged == 1
    assert batch.flagged_interval == pytest.approx((0.00505, 0.71642), abs=1e-5)  # of tables: 1 of 5
    assert batch.median_p == pytest.approx((1 + 10) / 20)


@pytest.mark.parametrize(("calibrated", "images"), [(19, 50), (62, 200)])
def test_unchanged_normals_are_seldom_called_shifted(calibrated: int, images: int) -> None:
    draws = np.random.default_rng(calibrated).normal(size=(2000, calibrated + images))
    called = [
        batches(calibration(draw[:calibrated]), list(draw[calibrated:]), images, 0.05)[0].shift != "none"
        for draw in draws
    ]
    assert np.mean(called) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(("moved", "shift"), [(1.5, "higher"), (-1.5, "lower")])
def test_a_shift_is_seen_with_its_direction(moved: float, shift: str) -> None:
    draw = np.random.default_rng(0).normal(size=262)
    assert batches(calibration(draw[:62]), list(draw[62:] + moved), 200, 0.001)[0].shift == shift


@pytest.mark.parametrize("calibrated", [2, 19, 102])
@pytest.mark.parametrize("level", [0.001, 0.05, 0.5])
def test_a_smaller_batch_cannot_be_called_shifted(calibrated: int, level: float) -> None:
    """However far its scores are off."""
    line = calibration(np.arange(1.0, calibrated + 1), target_fpr=0.5)
    least = least_replies(line, level)
    called = [batches(line, [1e9] * images, images, level)[0].shift for images in range(1, least + 1)]
    assert called == ["none"] * (least - 1) + ["higher"]


def test_some_defects_are_no_shift() -> None:
    draw = np.random.default_rng(0).normal(size=262)
    draw[-10:] += 100
    (batch,) = batches(calibration(draw[:62]), list(draw[62:]), 200, 0.001)
    assert batch.shift == "none"
    assert batch.flagged >= 10


def replies(*lines: object) -> io.StringIO:
    file = io.StringIO("".join(json.dumps(line) + "\n" for line in lines))
    file.name = "replies.jsonl"
    return file


def test_refusals_and_replies_of_another_bundle_are_left_out() -> None:
    given = replies(
        {"score": 1.5, "bundle_digest": DIGEST, "p_value": 0.5},
        {"score": 9.0, "bundle_digest": "e" * 64},
        {"path": "cut.png", "reason": "truncated", "message": "cut off"},
        {"error": {"code": "empty"}},
        {"path": "a.png", "score": 2},
    )
    assert read_scores(given, DIGEST) == ([1.5, 2.0], 3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"path": "a.png"}, "reply 2 is not one of the service"),
        ([1.0], "reply 2 is not one of the service"),
        ({"score": None}, "reply 2 is not one of the service"),
        ({"score": float("nan")}, "reply 2: score is nan"),
    ],
)
def test_what_is_no_reply_is_named(line: object, said: str) -> None:
    with pytest.raises(WTFlowError, match=f"replies.jsonl: {said}"):
        read_scores(replies({"score": 1.0}, line), DIGEST)


def test_no_reply_of_the_bundle_is_an_error() -> None:
    with pytest.raises(WTFlowError, match="no score of bundle dddddddddddd among 1"):
        read_scores(replies({"score": 9.0, "bundle_digest": "e" * 64}), DIGEST)
