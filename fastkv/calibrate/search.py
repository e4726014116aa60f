# SPDX-License-Identifier: Apache-2.0
"""The range with the smallest mean squared error, or mean of a higher power, over a histogram.

A candidate range goes through the formulas that the scales come from; its error is that of the
format's own codes, clipping included. A bin's mass is spread evenly over it, which makes the
error of rounding an integral in closed form: with `u = x * quant + zp` and g the code that u rounds
to, an antiderivative of `|u - g|^p` is `(u - g) * |u - g|^p / (p + 1)` plus a constant of g.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.calibrate.histogram import Histogram
from fastkv.quant import Granularity, QuantSpec
from fastkv.scales.calibration import side_scales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastkv.scales.calibration import Range

    F64 = NDArray[np.float64]

#: What of the observed range, or of one end of it, a candidate cuts off; below 0 it adds that.
CUTS = tuple(i / 40 for i in range(-4, 25) if i)
# Either end of an asymmetric range is searched with the other fixed, this often.
_ROUNDS = 2


def search(
    side: str,
    histogram: Histogram,
    seen: "Range",
    row: QuantSpec,
    layout: Granularity,
    power: int = 2,
) -> "Range":
    """The range in or near `seen` whose codes come closest, in the mean of the histogram's masses.

    Args:
        side: `k` or `v`.
        histogram: of the Hkv * D channels.
        seen: lowest and highest value of each channel, `[Hkv, D]` each.
        row: a static format.
        layout: what shares a multiplier; a symmetric format's heads are searched as one.
        power: p of the mean of |error|^p, at least 1; 2 is the mean squared error.
    """
    best = _Best(side, _Errors(histogram, row, power), row, layout, seen)
    low, high = seen
    if not row.needs_zp:
        amax = np.maximum(np.abs(low), np.abs(high))
        if layout is Granularity.HEAD:
            amax = np.broadcast_to(amax.max(axis=-1, keepdims=True), amax.shape)
        for cut in CUTS:
            best.consider((-amax * np.float32(1 - cut), amax * np.float32(1 - cut)))
        return best.range
    for _ in range(_ROUNDS):
        _, fixed = best.range
        for cut in CUTS:
            best.consider((low + np.float32(cut) * (high - low), fixed))
        fixed, _ = best.range
        for cut in CUTS:
            best.consider((fixed, high - np.float32(cut) * (high - low)))
    return best.range


class _Best:
    """The best range so far of each channel, or head."""

    def __init__(
        self, side: str, errors: "_Errors", row: QuantSpec, layout: Granularity, first: "Range"
    ) -> None:
        self.range = first
        self._side, self._row, self._layout = side, row, layout
        self._errors = errors
        self._error = self._of(first)

    def consider(self, candidate: "Range") -> None:
        """Take the candidate where it is possible and strictly better."""
        low, high = candidate
        possible = low < high
        error = self._of((low, np.where(possible, high, low)))
        better = possible & (error < self._error)
        self._error = np.where(better, error, self._error)
        self.range = np.where(better, low, self.range[0]), np.where(better, high, self.range[1])

    def _of(self, candidate: "Range") -> "F64":
        """Sum of the errors, `[Hkv, D]`; a head's in all of its channels."""
        shape = candidate[0].shape
        found = side_scales(self._side, candidate, self._row, self._layout)
        quant, _, zp = (None if x is None else _channels(x, shape) for x in found)
        assert quant is not None, "a static format has multipliers"
        errors = self._errors.of(quant, 0.0 if zp is None else zp).reshape(shape)
        if self._layout is Granularity.HEAD:
            errors = np.broadcast_to(errors.sum(axis=-1, keepdims=True), shape)
        return errors


def _channels(x: "NDArray[Any]", shape: tuple[int, ...]) -> "F64":
    """`[Hkv]` or `[Hkv, D]` as `[Hkv * D]`, float64."""
    wide = x if x.ndim == len(shape) else x[:, None]
    return np.broadcast_to(wide, shape).reshape(-1).astype(np.float64)


class _Errors:
    """Errors, to a power, of a histogram's channels under given multipliers."""

    def __init__(self, histogram: Histogram, row: QuantSpec, power: int) -> None:
        self._codes = codes_of(row, power)
        width = histogram.width[:, None]
        self._edges = histogram.start[:, None] + width * np.arange(histogram.bins + 1)
        # sum_b mass[b] * (F(b + 1) - F(b)), by parts: each edge's F is needed once.
        self._steps = -np.diff(histogram.mass / width, axis=1, prepend=0, append=0)

    def of(self, quant: "F64", zp: "F64 | float") -> "F64":
        """Sum of mass times |error|^p of each channel, `[C]`."""
        codes = self._edges * quant[:, None] + np.asarray(zp).reshape(-1, 1)
        total = np.einsum("cb,cb->c", self._codes.integral(codes), self._steps)
        found: F64 = total / quant ** (self._codes.power + 1)
        return found


@dataclass(frozen=True)
class Codes:
    """The values that a format's codes have, ascending.

    Attributes:
        values: `[n]`.
        middles: between neighbours, `[n - 1]`: where rounding changes.
        constants: what makes the integral continuous, `[n]`.
        power: p of |error|^p.
    """

    values: "F64"
    middles: "F64"
    constants: "F64"
    power: int

    def integral(self, u: "F64") -> "F64":
        """An antiderivative of |u - its code|^p, at u."""
        if len(self.values) == self.values[-1] - self.values[0] + 1:  # integers: no search
            at = (np.clip(np.rint(u), *self.values[[0, -1]]) - self.values[0]).astype(np.intp)
        else:
            at = np.searchsorted(self.middles, u)
        off = u - self.values[at]
        found: F64 = self.constants[at] + _signed_power(off, self.power)
        return found


def _signed_power(x: "F64", p: int) -> "F64":
    """`x * |x|^p / (p + 1)`, the antiderivative of `|x|^p`."""
    magnitude, found = np.abs(x), x / (p + 1)
    for _ in range(p):
        found = found * magnitude
    return found


@cache
def codes_of(row: QuantSpec, power: int = 2) -> Codes:
    """The codes of a static format, for the integral of |error|^power."""
    import ml_dtypes

    assert row.storage is not None, "a static format has a storage dtype"
    assert row.code_min is not None, "a static format has codes"
    assert row.code_max is not None, "a static format has codes"
    if row.storage.startswith("float"):
        dtype = getattr(ml_dtypes, row.storage)
        every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
        values = np.unique(every[(every >= row.code_min) & (every <= row.code_max)])
    else:
        values = np.arange(row.code_min, row.code_max + 1)
    middles = (values[1:] + values[:-1]) / 2
    jumps = _signed_power(middles - values[:-1], power) - _signed_power(middles - values[1:], power)
    return Codes(values, middles, np.concatenate([[0.0], np.cumsum(jumps)]), power)
