"""Scores counted in bins that nobody has to choose, in memory that does not grow with their number.

The bits of a float32, read as a whole number, order like the floats themselves: that number is a score's key. A bin
holds all keys that agree but for their last `shift` bits. `shift` is the smallest that keeps the range of keys seen so
far within `BINS` bins, and bins of a larger shift are unions of those of a smaller one. So a histogram depends on the
scores alone, neither on their order nor on how they were dealt out: histograms of parts add up to that of the whole.

    scores within 4 % of each other       a bin for every float32: exact
    within a factor of 1000               relative width at most 2^-16
    from 0 to 1000                        relative width at most 2^-12
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 2**20


class Window(NamedTuple):
    """Which bins are held: those of the keys `first << shift` and up, `size` of them."""

    shift: int
    first: int
    size: int

    @classmethod
    def over(cls, lowest: int, highest: int) -> "Window":
        """The finest window of at most `BINS` bins over this range of keys, with some room at both ends.

        The window of a wider range holds that of a narrower one. The room, an eighth of the range at most, spares
        most widenings.
        """
        room = max((highest - lowest).bit_length() - 4, 0)
        lowest, highest = lowest >> room << room, highest | (1 << room) - 1
        shift = 0
        while (highest >> shift) - (lowest >> shift) >= BINS:
            shift += 1
        return cls(shift, lowest >> shift, (highest >> shift) - (lowest >> shift) + 1)


class Histogram:
    """Rows of weights over bins of scores. A row of ones counts, exactly up to 2^53 scores."""

    def __init__(self, rows: int) -> None:
        self.weights = np.zeros((rows, 0))
        """[rows, bins], bins by ascending score."""
        self._range: tuple[int, int] | None = None
        self._window = Window(0, 0, 0)

    def add(self, row: int, scores: ArrayLike, weights: NDArray[np.float64] | float = 1.0) -> None:
        """Add `weights` (one for all, or one a score) to the bins of `scores`, in `row`. No NaN."""
        keys = ordered_keys(scores).ravel()
        if keys.size:
            self._cover(int(keys.min()), int(keys.max()))
            np.add.at(self.weights[row], (keys >> self._window.shift) - self._window.first, weights)

    def take(self, other: "Histogram") -> None:
        """Add all that `other` holds. It stays as it is."""
        if other._range:
            self._cover(*other._range)
            self.weights += other._seen_through(self._window)

    def _cover(self, lowest: int, highest: int) -> None:
        """Widen the window to these keys too."""
        if self._range:
            lowest, highest = min(lowest, self._range[0]), max(highest, self._range[1])
        if (lowest, highest) != self._range:
            window = Window.over(lowest, highest)
            if window != self._window:
                self.weights = self._seen_through(window)
            self._window, self._range = window, (lowest, highest)

    def _seen_through(self, window: Window) -> NDArray[np.float64]:
        """The weights in the bins of a window that is as wide or wider, and as coarse or coarser."""
        if window == self._window:
            return self.weights
        coarser = window.shift - self._window.shift
        bins = ((np.arange(self._window.size) + self._window.first) >> coarser) - window.first
        seen = np.empty((len(self.weights), window.size))
        for row, weights in zip(seen, self.weights, strict=True):
            row[:] = np.bincount(bins, weights, minlength=window.size)
        return seen


def ordered_keys(scores: ArrayLike) -> NDArray[np.int64]:
    """Whole numbers in [-2^31, 2^31) that order like the scores as float32; equal for 0 and -0."""
    bits = (np.ascontiguousarray(scores, dtype=np.float32) + np.float32(0)).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)
