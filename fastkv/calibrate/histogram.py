# SPDX-License-Identifier: Apache-2.0
"""A histogram per channel that grows with what it sees.

Bins are `[i * 2^e, (i + 1) * 2^e)`, e and the first i per channel. When a value falls outside, the
bins shift; when they no longer reach, e grows and bins merge two by two (or four by four, …), which
moves no mass across an edge. So the histogram of a stream is the one of its whole, in any order and
any chunks, up to the float64 sums of the weights.

Error: a channel's bins are at most `2 / (bins - 1)` of its range wide (or 2^-21 of its largest
magnitude, or 2^-60, where that is more), and a quantile read from them is off by less than a bin.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]
    F64 = NDArray[np.float64]

BINS = 512
# x / 2^e stays below 2^22, so that float32 keeps it apart from its neighbours; and a channel of
# zeros gets this bin.
_DIGITS = 22
_SMALLEST_EXPONENT = -60


class Histogram:
    """Weighted histograms of C channels.

    Attributes:
        mass: the weights' sums, `[C, bins]` float64.
        width: of the bins, `[C]` float64.
        start: lower edge of the first bin, `[C]` float64.

    Args:
        channels: C.
        bins: of each channel, an even number.
    """

    def __init__(self, channels: int, bins: int = BINS) -> None:
        self.mass: F64 = np.zeros((channels, bins))
        self._exponent = np.full(channels, _SMALLEST_EXPONENT)
        self._first = np.zeros(channels, np.int64)
        self._low: F64 = np.full(channels, np.inf)
        self._high: F64 = np.full(channels, -np.inf)

    @property
    def bins(self) -> int:
        """Bins of a channel."""
        return int(self.mass.shape[1])

    @property
    def width(self) -> "F64":
        """Width of each channel's bins, `[C]`."""
        found: F64 = np.ldexp(1.0, self._exponent)
        return found

    @property
    def start(self) -> "F64":
        """Lower edge of each channel's first bin, `[C]`."""
        found: F64 = self._first * self.width
        return found

    def add(self, x: "F32", weights: "NDArray[Any]") -> None:
        """Count values.

        Args:
            x: finite values, `[n, C]`, n at least 1.
            weights: of each value, >= 0, `[n, C]` or what broadcasts to it.
        """
        self._reach(x.min(axis=0), x.max(axis=0))
        channels, bins = self.mass.shape
        index = np.floor(x / self.width).astype(np.int64) - self._first
        flat = index + np.arange(channels) * bins
        spread = np.broadcast_to(weights, x.shape).ravel()
        self.mass += np.bincount(flat.ravel(), spread, channels * bins).reshape(self.mass.shape)

    def below(self, x: "F64") -> "F64":
        """Mass below `x [C]`, taking each bin's as spread evenly: `[C]`."""
        place = np.clip((x - self.start) / self.width, 0, self.bins)
        whole = np.minimum(place.astype(np.int64), self.bins - 1)
        running = np.concatenate([np.zeros((len(x), 1)), self.mass.cumsum(axis=1)], axis=1)
        at = np.arange(len(x))
        found: F64 = running[at, whole] + (place - whole) * self.mass[at, whole]
        return found

    def _reach(self, low: "F32", high: "F32") -> None:
        """Make room for values in `[low, high]`."""
        self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)
        exponent = _exponent(self._low, self._high, self.bins)
        first = np.floor(np.ldexp(self._low, -exponent)).astype(np.int64)
        if np.array_equal(exponent, self._exponent) and np.array_equal(first, self._first):
            return
        old = self._first[:, None] + np.arange(self.bins)
        index = (old >> (exponent - self._exponent)[:, None]) - first[:, None]
        flat = index + np.arange(len(self.mass))[:, None] * self.bins
        kept = self.mass > 0  # empty bins may lie anywhere; those with mass are within reach
        merged = np.bincount(flat[kept], self.mass[kept], self.mass.size)
        self.mass = merged.reshape(self.mass.shape).astype(np.float64)  # integers, of none
        self._exponent, self._first = exponent, first


def _exponent(low: "F64", high: "F64", bins: int) -> "NDArray[np.int64]":
    """The smallest e at which the bins from low on reach high, `[C]`."""
    magnitude = np.maximum(np.abs(low), np.abs(high))
    digits = _power(magnitude) + 1 - _DIGITS
    exponent = np.maximum(digits, _power((high - low) / (bins - 1)))
    need = np.floor(np.ldexp(high, -exponent)) - np.floor(np.ldexp(low, -exponent))
    found: NDArray[np.int64] = exponent + (need >= bins)
    return found


def _power(x: "F64") -> "NDArray[np.int64]":
    """The largest e with 2^e <= x, at least the smallest exponent."""
    power = np.where(x > 0, np.frexp(x)[1] - 1, _SMALLEST_EXPONENT)
    found: NDArray[np.int64] = np.maximum(power, _SMALLEST_EXPONENT).astype(np.int64)
    return found
