# SPDX-License-Identifier: Apache-2.0
"""`merge_states` against float64, and the states that hold nothing."""

import math

import numpy as np
import pytest

from fastkv import ops
from helpers import oracle
from helpers.batches import floats
from helpers.compare import assert_close, bits

NAN, INF = math.nan, math.inf


def merge64(out_a, lse_a, out_b, lse_b):
    out_a, lse_a, out_b, lse_b = map(oracle.values_of, (out_a, lse_a, out_b, lse_b))
    lse = np.logaddexp(lse_a, lse_b)
    return (
        np.exp(lse_a - lse)[..., None] * out_a + np.exp(lse_b - lse)[..., None] * out_b,
        lse,
    )


def states(rng, dtype="float32", rows=7, spread=3.0):
    made = []
    for _ in range(2):
        made += [floats(rng, (rows, 6, 32), dtype), floats(rng, (rows, 6), scale=spread)]
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_matches_float64(dtype, spread):
    given = states(np.random.default_rng(3), dtype, spread=spread)
    copies = [bits(array) for array in given]
    out, lse = ops.merge_states(*given)
    want, want_lse = merge64(*given)
    assert out.dtype == given[0].dtype
    assert lse.dtype == np.float32
    assert_close(out, want)
    assert_close(lse, want_lse)
    for array, copy in zip(given, copies, strict=True):
        np.testing.assert_array_equal(bits(array), copy)


def test_the_order_of_the_states_does_not_matter():
    a, lse_a, b, lse_b = states(np.random.default_rng(5))
    out, lse = ops.merge_states(a, lse_a, b, lse_b)
    swapped, lse_swapped = ops.merge_states(b, lse_b, a, lse_a)
    np.testing.assert_array_equal(out, swapped)
    np.testing.assert_array_equal(lse, lse_swapped)


@pytest.mark.parametrize("empty", [0, 1])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 3.0])
def test_an_empty_state_is_not_read(empty, garbage):
    given = states(np.random.default_rng(7))
    given[2 * empty][...] = garbage
    given[2 * empty + 1][...] = -INF
    out, lse = ops.merge_states(*given)
    other = 2 * (1 - empty)
    np.testing.assert_array_equal(out, given[other])
    np.testing.assert_array_equal(lse, given[other + 1])


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 3.0])
def test_two_empty_states_give_zero_and_minus_infinity(garbage):
    given = states(np.random.default_rng(11))
    for i in (0, 2):
        given[i][2] = garbage
        given[i + 1][2] = -INF
    out, lse = ops.merge_states(*given)
    assert not bits(out[2]).any()
    assert np.isneginf(lse[2]).all()
    assert np.isfinite(lse[[0, 1, 3]]).all()
    assert np.isfinite(out).all()


def test_a_nan_of_a_state_that_holds_keys_is_kept_to_its_row_and_head():
    given = states(np.random.default_rng(13))
    given[0][4, 2, 7] = NAN
    out, _ = ops.merge_states(*given)
    assert np.argwhere(np.isnan(out)).tolist() == [[4, 2, 7]]


def test_far_apart_states_do_not_overflow():
    a, lse_a, b, lse_b = states(np.random.default_rng(17))
    lse_a[...], lse_b[...] = 1000.0, -1000.0
    out, lse = ops.merge_states(a, lse_a, b, lse_b)
    np.testing.assert_array_equal(out, a)
    np.testing.assert_array_equal(lse, lse_a)


def test_equal_states_gain_log_two():
    a, lse_a, b, _ = states(np.random.default_rng(19))
    out, lse = ops.merge_states(a, lse_a, b, lse_a)
    assert_close(out, (a.astype(np.float64) + b) / 2)
    assert_close(lse, lse_a.astype(np.float64) + math.log(2))


def test_no_rows():
    out, lse = ops.merge_states(*states(np.random.default_rng(23), rows=0))
    assert out.shape == (0, 6, 32)
    assert lse.shape == (0, 6)
