# SPDX-License-Identifier: Apache-2.0
"""One comparison for all floating-point results.

`want` is float64 over the values that the cache holds (`oracle.read_cache`), so what is left to
tolerate is arithmetic. What a format loses by quantizing is another question: `relative_error`.
Bytes are compared bitwise, with `assert_same_bits`.
"""

from typing import NamedTuple

import numpy as np

from helpers.oracle import values_of

EPS = 2.0**-24  # half a unit in the last place of float32


class Tolerance(NamedTuple):
    """Absolute, as a share of the largest |want|."""

    reads: float  # one value, dequantized
    attends: float  # softmax(q k) v over such values


# RMS norm and RoPE before anything is quantized, whatever the format. D <= 256 squares: a product
# rounds once and the sum folds halves, 8 more, all positive, and the root halves it; mean, epsilon,
# root, quotient and weight: 5; the rotation: 3, of at most sqrt(2) times the largest value. 4.5 + 5
# + 5 EPS, rounded up.
ROTATES = 16 * EPS


# A score is a sum of D <= 256 products with |q k| <= ~16 each and scale 1 / sqrt(D) = 1/16. BLAS
# sums in blocks; its error grows like sqrt(D) * EPS * (the largest partial sum, ~64) * scale = 64
# EPS. A weight errs by as much relative to itself, exp and the sum over L <= 4096 keys add
# another ~10, and both numerator and denominator carry it: 2 * (64 + 10) EPS, rounded up to 256.
_ATTENTION = 256 * EPS

TOLERANCES = {
    # Stored as computed: a read is exact.
    "none": Tolerance(0.0, _ATTENTION),
    # code * dequant: one float32 product, EPS.
    "cache_int8": Tolerance(EPS, _ATTENTION + EPS),
    "cache_fp8": Tolerance(EPS, _ATTENTION + EPS),
    # (code - zp) * dequant: two roundings. The first errs by EPS of |code| + |zp| <= 16, where the
    # difference may be as small as a step, so relative to the largest value (15 steps) it is ~EPS.
    "cache_int4_zp": Tolerance(3 * EPS, _ATTENTION + 3 * EPS),
    # code * scale of the row: one product.
    "block_wise_fp8": Tolerance(EPS, _ATTENTION + EPS),
}

# Rounding to the result's dtype, relative to each value: half a unit in the last place.
ROUNDING = {"float32": EPS, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# ... and where it is subnormal there, half of the smallest number.
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def assert_close(got, want, quant="none", *, reads=False):
    """Compare a result with its float64 reference.

    Args:
        got: a NumPy array in float32, float16 or bfloat16.
        want: float64.
        quant: the format of the cache that was read.
        reads: the values were only read, not attended to.
    """
    row = TOLERANCES[str(quant)]
    _compare(got, want, row.reads if reads else row.attends, str(quant))


def assert_rotated(got, want):
    """Compare heads after norm and RoPE with their float64 reference."""
    _compare(got, want, ROTATES, "rotated")


def _compare(got, want, share, name):
    values, want = values_of(got), np.asarray(want, np.float64)
    assert values.shape == want.shape, f"shape {values.shape}, want {want.shape}"
    for what, mask in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        _assert_same_places(what, mask(values), mask(want), values, want)
    finite = np.isfinite(want)
    if not finite.any():
        return
    error = np.abs(np.where(finite, values, 0) - np.where(finite, want, 0))
    size = np.abs(np.where(finite, want, 0))
    dtype = got.dtype.name
    allowed = share * size.max() + 1.001 * ROUNDING[dtype] * size + SMALLEST[dtype]
    off = np.where(finite, error - allowed, -np.inf)
    if off.max() > 0:
        at = tuple(int(i) for i in np.unravel_index(off.argmax(), off.shape))
        raise AssertionError(
            f"{name}: worst at {at}: got {values[at]:.9g}, want {want[at]:.9g}, "
            f"allowed ±{allowed[at]:.3g}; {(off > 0).sum()} of {off.size} are off"
        )


def _assert_same_places(what, got, want, values, wanted):
    different = got != want
    if different.any():
        at = tuple(int(i) for i in np.argwhere(different)[0])
        raise AssertionError(
            f"{what} at other places: first at {at}: got {values[at]}, want {wanted[at]}; "
            f"{different.sum()} of {different.size}"
        )


def assert_same_bits(got, want):
    """Compare storage, bit for bit; arrays of equal item size and any dtype."""
    got, want = bits(got), bits(want)
    assert got.dtype == want.dtype, f"{got.dtype} bits, want {want.dtype}"
    assert got.shape == want.shape, f"shape {got.shape}, want {want.shape}"
    different = got != want
    if different.any():
        at = tuple(int(i) for i in np.argwhere(different)[0])
        raise AssertionError(
            f"first at {at}: got {got[at]:#x}, want {want[at]:#x}; "
            f"{different.sum()} of {different.size} differ"
        )


def bits(array):
    """A copy of an array's storage as unsigned integers, in C order."""
    array = np.array(array, order="C")
    return array.view(f"u{array.dtype.itemsize}")


def relative_error(got, want):
    """Frobenius norm of the error over that of the reference: what quantization cost."""
    want = np.asarray(want, np.float64)
    return float(np.linalg.norm(values_of(got) - want) / np.linalg.norm(want))
