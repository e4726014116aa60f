# SPDX-License-Identifier: Apache-2.0
"""`paged_attention` on a GPU with scales and queries of every dtype and size."""

import numpy as np
import pytest

from helpers.paged_on_gpu import (
    BLOCK_WISE,
    CASES,
    INT4,
    alone,
    assert_alike,
    assert_right,
    batch_of,
    case_name,
    run,
)

DECODE_ROWS = CASES[14]


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", [DECODE_ROWS, BLOCK_WISE], ids=case_name)
def test_scales_of_two_bytes_agree_with_float64(case, scale_dtype):
    batch, q = batch_of(case, scale_dtype=scale_dtype)
    assert_right(batch, q, window=60)


@pytest.mark.parametrize("static_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", [CASES[6], CASES[8], INT4], ids=case_name)
def test_multipliers_of_two_bytes_agree_with_float64(case, static_dtype):
    batch, q = batch_of(case, static_dtype=static_dtype)
    assert_right(batch, q)


@pytest.mark.parametrize("case", [DECODE_ROWS, BLOCK_WISE], ids=case_name)
def test_scales_far_apart_agree_with_float64(case):
    # From one token to the next V's scale changes by up to 2^24, K's by up to 2^4.
    batch, q = batch_of(case)
    rng = np.random.default_rng(7)
    for name, most in (("k_scale", 2), ("v_scale", 12)):
        scale = getattr(batch.cache, name)
        scale *= 2.0 ** rng.integers(-most, most + 1, scale.shape).astype(np.float32)
    whole = assert_right(batch, q)
    for order in ([0], [3, 1]):
        part, part_q, _, rows = alone(batch, q, order)
        assert_alike(whole, run(part, part_q), rows)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**110])
@pytest.mark.parametrize("case", [CASES[6], INT4, BLOCK_WISE], ids=case_name)
def test_queries_near_the_ends_of_the_range_give_no_nan(case, size):
    batch, q = batch_of(case, dtype="float32")
    out, lse = run(batch, q * np.float32(size))
    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
