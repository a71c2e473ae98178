"""Bins follow the order of the floats, and depend on nothing but the scores."""

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wtflow.scoring import histogram as histogram_module
from wtflow.scoring.histogram import BINS, Histogram, Window, ordered_keys

FLOATS = st.floats(width=32, allow_nan=False)
PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no reason to fail."""
KEYS = st.integers(-(2**31), 2**31 - 1)


def rounded_to_bins(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores, none of them negative, with the bits cleared that the bins over all of them do not tell apart."""
    keys = scores.view(np.int32)
    window = Window.over(int(keys.min()), int(keys.max()))
    return (keys >> window.shift << window.shift).view(np.float32)


def filled(scores: list[float]) -> Histogram:
    histogram = Histogram(rows=1)
    histogram.add(0, np.array(scores, dtype=np.float32))
    return histogram


@PATIENT
@given(FLOATS, FLOATS)
def test_keys_order_like_floats(a: float, b: float) -> None:
    key_a, key_b = ordered_keys(np.array([a, b])).tolist()
    assert (key_a < key_b, key_a == key_b) == (a < b, a == b)
    assert -(2**31) <= key_a < 2**31


@PATIENT
@given(KEYS, KEYS, KEYS, KEYS)
def test_a_wider_range_has_a_window_that_holds_the_narrower_ones(a: int, b: int, c: int, d: int) -> None:
    lowest, inner, outer, highest = sorted([a, b, c, d])
    wide, narrow = Window.over(lowest, highest), Window.over(inner, outer)
    assert wide.shift >= narrow.shift
    assert wide.first << wide.shift <= min(lowest, narrow.first << narrow.shift)
    assert (wide.first + wide.size) << wide.shift >= max(highest + 1, (narrow.first + narrow.size) << narrow.shift)
    assert wide.size <= BINS


def test_the_resolutions_that_are_promised() -> None:
    for low in np.linspace(1, 2, 17, dtype=np.float32):
        keys = ordered_keys(np.array([0.0, low, 1.04 * low, 1000.0, 1000 * low]))
        assert Window.over(int(keys[1]), int(keys[2])).shift == 0
        assert 23 - Window.over(int(keys[1]), int(keys[4])).shift >= 16
        assert 23 - Window.over(int(keys[0]), int(keys[3])).shift >= 12


@contextmanager
def few_bins() -> Iterator[None]:
    """256 bins: scores meet in them at once, and hardly any memory is touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(histogram_module, "BINS", 256)
        yield


@few_bins()
@PATIENT
@given(st.lists(st.lists(FLOATS, max_size=5), min_size=1, max_size=5), st.randoms())
def test_one_pass_and_parts_in_any_order_hold_the_same(parts: list[list[float]], random: Random) -> None:
    whole = filled([score for part in parts for score in part])
    random.shuffle(parts)
    total = Histogram(rows=1)
    for part in parts:
        total.take(filled(part))
    assert np.array_equal(total.weights, whole.weights)
    assert whole.weights.sum() == sum(len(part) for part in parts)


def test_weights_go_to_the_bin_of_their_score() -> None:
    histogram = Histogram(rows=2)
    histogram.add(1, np.array([2.0, 1.0, 2.0]), np.array([0.5, 0.25, 0.125]))
    used = np.flatnonzero(histogram.weights[1])
    assert histogram.weights[1][used].tolist() == [0.25, 0.625]
    assert not histogram.weights[0].any()


@pytest.mark.parametrize("values", [[0.0, -0.0], [np.inf, np.inf], [1.0, 1.0 + 1e-9]])
def test_what_is_one_float32_is_one_bin(values: list[float]) -> None:
    assert np.count_nonzero(filled(values).weights) == 1
