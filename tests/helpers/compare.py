# SPDX-License-Identifier: Apache-2.0
"""One comparison for all floating-point results.

`want` is float64 over the values that the cache holds (`oracle.read_cache`), so what is left to
tolerate is arithmetic. What a format loses by quantizing is another question: `relative_error`.
Bytes are compared bitwise, with `assert_same_bits`.
"""

from typing import Any, NamedTuple

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


class Attended(NamedTuple):
    """Attention in float64 of chosen rows, and the sizes that bound how far tensor cores may err.

    Attributes:
        rows: their indices in q, `[n]`.
        out: `[n, Hq, D]`.
        lse: `[n, Hq]`.
        score: the largest `scale sum |q k|` of a key that is seen, `[n, Hq]`.
        value: attention over |v| in place of v, `[n, Hq, D]`.
        beside_score: `scale sum |q| (|code| + |zp|) dequant` at most, 0 without zero points.
        beside_value: `(|code| + |zp|) dequant` at most, likewise.
        keys: how many keys the row sees, `[n]`.
        weight: half a unit in the last place of the products' number type.
        query: how much each element of q is rounded by, relative to itself.
        cap: `soft_cap`, or 0.
    """

    rows: Any
    out: Any
    lse: Any
    score: Any
    value: Any
    beside_score: Any
    beside_value: Any
    keys: Any
    weight: float
    query: float
    cap: float


# What a tensor core loses beside rounding its operands: it adds 16 products to a float32 sum,
# truncating each to the largest's last place, so 17 * 2^-23 a step and D / 16 <= 16 steps; and the
# scores' own float32 arithmetic (scale, maximum, 2^x to 2 ulp) and the folds of at most 8 tiles, 4
# warps, 16 chunks and 16 groups, 2 EPS each. 272 * 2^-23 + 100 * 2^-24 < 2^-14.
PRODUCTS = 2.0**-14


def query_rounding(q, product, channels):
    """Relative error of an element of q as the products take it; a factor 2^n rounds nothing.

    Args:
        q: dtype of q.
        product: number type of the products.
        channels: K's scale is per channel and multiplied into q, in float32.
    """
    exact = q == product or (q, product) == ("bfloat16", "float16")
    return 0.0 if exact and not channels else ROUNDING[product] + EPS


def assert_attends(got, lse, want):
    """Compare rows of an output of tensor cores, and their LSE, with `Attended`.

    A score errs by what rounding q and adding lose, and by 8 EPS of a cap (tanh through 2^x). A
    weight errs by that, and by its own rounding, `weight` or below 2^-14 of the largest 2^-25 of
    it; numerator and denominator carry it alike, and the sink's share once more.
    """
    score = want.query * want.score + PRODUCTS * (want.score + want.beside_score)
    score = score + 8 * EPS * want.cap
    weight = want.weight + want.keys[:, None] * 2.0**-25 + PRODUCTS
    share = (3 * np.expm1(score) + 2 * weight)[..., None]
    allowed = share * want.value + PRODUCTS * want.beside_value
    _compare_within(got[want.rows], want.out, allowed, "out")
    if lse is not None:
        allowed = score + weight + 4 * EPS * np.abs(np.nan_to_num(want.lse, neginf=0))
        _compare_within(lse[want.rows], want.lse, allowed, "lse")
    empty = want.keys == 0
    assert not values_of(got[want.rows])[empty].any(), "a row that sees no key is exactly 0"


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
    finite = np.abs(np.asarray(want, np.float64)[np.isfinite(want)])
    _compare_within(got, want, share * finite.max(initial=0.0), name)


def _compare_within(got, want, allowed, name):
    """`allowed`: absolute, before the rounding to the result's dtype."""
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
    allowed = allowed + 1.001 * ROUNDING[dtype] * size + SMALLEST[dtype]
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
