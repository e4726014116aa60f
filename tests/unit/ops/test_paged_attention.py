# SPDX-License-Identifier: Apache-2.0
"""`paged_attention` against float64 over what the cache holds."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkv import ops
from helpers import oracle
from helpers.batches import (
    VARIANTS,
    case_id,
    covering_cases,
    floats,
    make_batch,
    snapshot,
    tensors_of,
)
from helpers.compare import assert_close, assert_same_bits, bits

NAN = math.nan


def intervals_of(rng, batch):
    """A random interval for every row, some empty, some behind the row's own position."""
    intervals = np.zeros((len(batch.qkv), 2), np.int32)
    for b, length in enumerate(batch.lengths):
        ends = np.sort(rng.integers(0, length + 1, (batch.new[b], 2)), axis=1)
        intervals[batch.rows(b)] = ends
    return intervals


def attend64(batch, q, *, causal=True, window=None, scale=None, mask_offsets=None, **shape):
    """Float64 out and LSE of every row; the cache is read by the oracle."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for b, (length, new) in enumerate(zip(batch.lengths, batch.new, strict=True)):
        rows = batch.rows(b)
        own = None if mask_offsets is None else mask_offsets[rows]
        mask = oracle.visible_mask(new, length, causal, window, own)
        page = np.arange(length) // batch.cache.spec.page_size
        mask &= batch.block_table[b, page] >= 0
        k, v = (batch.held(side, b) for side in "kv")
        out[rows], lse[rows] = oracle.attention(q[rows], k, v, mask, scale, **shape)
    return out, lse


def assert_attends(batch, q, before_rows=0, **options):
    """Run into a poisoned `out` and compare; returns both results."""
    out = np.full(q.shape, NAN).astype(q.dtype)
    before = snapshot(batch.cache)
    got, lse = ops.paged_attention(
        q, batch.cache, **batch.meta, return_lse=True, out=out, **options
    )
    assert got is out
    assert lse.dtype == np.float32
    want_out, want_lse = attend64(batch, q, **options)
    want_out[:before_rows] = NAN  # rows of somebody else are left alone
    assert_close(got, want_out, batch.format)
    assert_close(lse, want_lse, batch.format)
    for name, tensor in before.items():
        assert_same_bits(getattr(batch.cache, name), tensor)
    return got, lse


def queries(rng, batch, dtype="float32", scale=1.0):
    spec = batch.cache.spec
    return floats(rng, (len(batch.qkv), batch.query_heads, spec.head_dim), dtype, scale)


@pytest.mark.parametrize("case", covering_cases(), ids=case_id)
def test_matches_float64(case):
    rng = np.random.default_rng(3)
    batch = make_batch(rng, cached=(37, 0, 6, 19), new=(1, 5, 0, 2), **case).fill(rng)
    assert_attends(batch, queries(rng, batch, case["qkv_dtype"]))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 7},
        {"window": 10_000},
        {"causal": False},
        {"causal": False, "window": 4},
        {"soft_cap": 2.0},
        {"scale": 0.7},
        {"scale": -0.3, "soft_cap": 1.5},
    ],
    ids=str,
)
def test_options_match_float64(variant, options):
    rng = np.random.default_rng(5)
    batch = make_batch(rng, *variant, cached=(21, 0, 40), new=(4, 6, 1)).fill(rng)
    assert_attends(batch, queries(rng, batch), **options)


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("largest_zp", [0.5, 8.0])
def test_zero_points_with_soft_cap_sinks_and_empty_rows(soft_cap, with_sinks, largest_zp):
    # What a kernel that folds zero points into constants gets wrong first.
    rng = np.random.default_rng(7)
    batch = make_batch(
        rng, "cache_int4_zp", cached=(33, 0, 9), new=(5, 4, 3), largest_zp=largest_zp
    ).fill(rng)
    static = batch.cache.static
    assert np.abs(static.k_zp).max() > 0.9 * largest_zp
    intervals = intervals_of(rng, batch)
    intervals[::3, 1] = intervals[::3, 0]  # empty
    sinks = floats(rng, batch.query_heads, scale=2) if with_sinks else None
    out, lse = assert_attends(
        batch, queries(rng, batch), soft_cap=soft_cap, sinks=sinks, mask_offsets=intervals
    )
    assert not bits(out[::3]).any()
    assert np.isneginf(lse[::3]).all()


@settings(max_examples=40, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    variant=st.sampled_from(VARIANTS),
    requests=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)), min_size=0, max_size=4),
    page_size=st.sampled_from([1, 3, 16, 64]),
    group=st.sampled_from([1, 2, 3, 4, 8, 16]),
    options=st.fixed_dictionaries(
        {
            "causal": st.booleans(),
            "window": st.sampled_from([None, 1, 2, 17]),
            "soft_cap": st.sampled_from([None, 1.0, 30.0]),
        }
    ),
    extras=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2)),
    tiling=st.tuples(st.sampled_from([1, 5, 256]), st.sampled_from([1, 100, 1 << 24])),
)
def test_random_batches(seed, variant, requests, page_size, group, options, extras, tiling):
    rng = np.random.default_rng(seed)
    with_sinks, with_intervals, with_absent, padding = extras
    batch = make_batch(
        rng,
        *variant,
        cached=[cached for cached, _ in requests],
        new=[new for _, new in requests],
        page_size=page_size,
        group=group,
        head_dim=16,
        padding=padding,
    ).fill(rng)
    if with_absent:
        batch.block_table[rng.random(batch.block_table.shape) < 0.3] = -1
    options["sinks"] = floats(rng, batch.query_heads) if with_sinks else None
    options["mask_offsets"] = intervals_of(rng, batch) if with_intervals else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkv.ops.reference.paging.CHUNK_TOKENS", tiling[0])
        patch.setattr("fastkv.ops.reference.attend._SCORES", tiling[1])
        assert_attends(batch, queries(rng, batch), **options)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_long_prefill_crosses_row_tiles_and_chunks(variant, monkeypatch):
    rng = np.random.default_rng(11)
    batch = make_batch(rng, *variant, cached=(50, 3), new=(60, 40), page_size=8).fill(rng)
    q = queries(rng, batch)
    # 16 tokens a chunk; 6 heads * 110 keys * 7 rows a tile
    monkeypatch.setattr("fastkv.ops.reference.paging.CHUNK_TOKENS", 16)
    monkeypatch.setattr("fastkv.ops.reference.attend._SCORES", 6 * 110 * 7)
    assert_attends(batch, q)
    assert_attends(batch, q, window=13, mask_offsets=intervals_of(rng, batch))


def test_large_logits_do_not_overflow():
    rng = np.random.default_rng(13)
    batch = make_batch(rng, cached=(30, 5), new=(2, 3)).fill(rng)
    q = queries(rng, batch, scale=30.0)
    got, lse = ops.paged_attention(q, batch.cache, **batch.meta, return_lse=True)
    want, want_lse = attend64(batch, q)
    assert np.abs(want_lse).max() > 89  # exp of it overflows float32
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
    np.testing.assert_allclose(got, want, atol=1e-3)  # weights err by the scores' 1e-5 * 100


# --- who sees what ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_bytes_of_nobody_never_matter(variant):
    rng = np.random.default_rng(17)
    batch = make_batch(rng, *variant, cached=(21, 0, 8), new=(2, 3, 1)).fill(rng)
    q = queries(rng, batch)
    first = assert_attends(batch, q)
    owned = set(batch.owned_slots("all"))
    for tensor in tensors_of(batch.cache).values():
        raw = tensor.view(f"u{tensor.itemsize}")
        for page in range(raw.shape[0]):
            for slot in range(raw.shape[2]):
                if (page, slot) not in owned:
                    raw[page, :, slot] = 0x7F7F7F7F & (256**tensor.itemsize - 1) | 0x40
                    if tensor.dtype.kind == "f" and tensor.itemsize > 1:
                        tensor[page, :, slot] = np.inf
    second = assert_attends(batch, q)
    for before, after in zip(first, second, strict=True):
        assert_same_bits(after, before)


@pytest.mark.parametrize("fmt", ["none", "cache_fp8", "block_wise_fp8"])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_nan_key_reaches_the_rows_that_see_it_and_no_other(fmt, side, value):
    rng = np.random.default_rng(19)
    batch = make_batch(rng, fmt, cached=(20,), new=(6,), page_size=8).fill(rng)
    page, slot = batch.block_table[0, 22 // 8], 22 % 8  # the third new token
    data = getattr(batch.cache, side)
    if fmt == "none":
        data[page, 0, slot, 5] = value
    else:
        data.view(np.uint8)[page, 0, slot, 5] = 0x7F
    if fmt == "block_wise_fp8" and math.isinf(value):
        getattr(batch.cache, f"{side}_scale")[page, 0, slot] = np.nan
    q = np.abs(queries(rng, batch))
    got, lse = ops.paged_attention(q, batch.cache, **batch.meta, return_lse=True)
    blind, heads = slice(0, 2), slice(0, batch.query_heads // 2)  # KV head 0
    want, want_lse = attend64(batch, q)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    assert not np.isfinite(got[2:, heads]).all(axis=(1, 2)).any()
    assert np.isfinite(got[blind]).all()
    assert np.isfinite(lse[blind]).all()
    assert_close(got[blind], want[blind], fmt)
    assert_close(lse[blind], want_lse[blind], fmt)
    # Nor the rows that a window or an interval keeps from it.
    intervals = np.array([[0, 26]] * 3 + [[23, 26]] * 3, np.int32)
    assert np.isfinite(
        ops.paged_attention(q, batch.cache, **batch.meta, mask_offsets=intervals)[3:]
    ).all()
    windowed = ops.paged_attention(q, batch.cache, **batch.meta, window=2)
    assert np.isfinite(windowed[[0, 1, 4, 5]]).all()
    assert not np.isfinite(windowed[2:4, heads]).all()


def test_many_nan_values_behind_the_rows_change_no_bit():
    rng = np.random.default_rng(23)
    batch = make_batch(rng, cached=(3,), new=(30,), page_size=4, padding=0).fill(rng)
    q = queries(rng, batch)
    clean = ops.paged_attention(q, batch.cache, **batch.meta)
    for i in range(20, 33):
        page, slot = batch.block_table[0, i // 4], i % 4
        batch.cache.v[page, :, slot] = batch.cache.k[page, :, slot] = NAN
    got = ops.paged_attention(q, batch.cache, **batch.meta)
    assert np.isnan(got[17:]).all()
    # Summation may go another way around the absent values, so not bitwise.
    assert_close(got[:17], clean[:17].astype(np.float64))


def test_absent_pages_are_never_seen_even_when_page_zero_holds_nan():
    rng = np.random.default_rng(29)
    batch = make_batch(rng, cached=(30, 12), new=(3, 2), page_size=8).fill(rng)
    for table in batch.block_table:
        zero = table == 0
        table[zero] = -1
    batch.block_table[0, 1] = -1
    batch.cache.k[0], batch.cache.v[0] = NAN, NAN
    batch.block_table[1, :2] = -1  # nothing left to see
    out, lse = assert_attends(batch, queries(rng, batch), sinks=floats(rng, 6))
    assert not out[3:].any()
    assert np.isneginf(lse[3:]).all()


def test_a_window_counts_the_rows_own_key():
    rng = np.random.default_rng(31)
    batch = make_batch(rng, cached=(9,), new=(4,)).fill(rng)
    q = queries(rng, batch)
    out, lse = ops.paged_attention(q, batch.cache, **batch.meta, window=1, return_lse=True)
    own = batch.held("v", 0)[9:]
    assert_close(out, np.repeat(own, 3, axis=1))
    k = np.repeat(batch.held("k", 0)[9:], 3, axis=1)
    assert_close(lse, (q * k).sum(-1) / 8)


def test_row_j_of_n_sees_the_cached_keys_and_j_plus_one_new_ones():
    rng = np.random.default_rng(37)
    batch = make_batch(rng, cached=(4,), new=(3,)).fill(rng)
    q = np.zeros((3, 6, 64), np.float32)  # uniform weights: the LSE counts keys
    _, lse = ops.paged_attention(q, batch.cache, **batch.meta, return_lse=True)
    np.testing.assert_allclose(np.exp(lse), np.broadcast_to([[5], [6], [7]], (3, 6)), rtol=1e-6)


def test_query_heads_of_a_group_share_a_kv_head():
    rng = np.random.default_rng(41)
    batch = make_batch(rng, cached=(9,), new=(1,), kv_heads=3, group=4).fill(rng)
    page_of = batch.block_table[0, 0]
    q = queries(rng, batch)
    before = ops.paged_attention(q, batch.cache, **batch.meta)
    batch.cache.v[page_of, 1] *= 2
    changed = ops.paged_attention(q, batch.cache, **batch.meta) != before
    assert changed.any(axis=-1)[0].tolist() == [False] * 4 + [True] * 4 + [False] * 4


# --- rows of nobody, empty input ---------------------------------------------------------------


def test_rows_before_the_batch_are_left_alone_and_rows_behind_it_are_zero():
    rng = np.random.default_rng(43)
    batch = make_batch(rng, first_row=2, padding=3).fill(rng)
    out, lse = assert_attends(batch, queries(rng, batch), before_rows=2)
    assert not bits(out[-3:]).any()
    assert np.isneginf(lse[-3:]).all()
    assert np.isnan(out[:2]).all()


def test_a_fresh_out_is_zero_before_the_batch_too():
    rng = np.random.default_rng(47)
    batch = make_batch(rng, first_row=2).fill(rng)
    assert not bits(ops.paged_attention(queries(rng, batch), batch.cache, **batch.meta)[:2]).any()


@pytest.mark.parametrize(("cached", "new"), [((), ()), ((4, 0), (0, 0))])
@pytest.mark.parametrize("padding", [0, 3])
def test_no_live_rows(cached, new, padding):
    rng = np.random.default_rng(53)
    batch = make_batch(rng, "cache_fp8", cached=cached, new=new, padding=padding).fill(rng)
    out, lse = assert_attends(batch, queries(rng, batch), sinks=floats(rng, 6))
    assert out.shape == (padding, 6, 64)
    assert not bits(out).any()
    assert np.isneginf(lse).all()


def test_a_request_without_rows_may_have_any_table():
    rng = np.random.default_rng(59)
    batch = make_batch(rng, cached=(20, 5), new=(0, 2)).fill(rng)
    table = batch.block_table.copy()
    table[0] = 2**31 - 1
    q = queries(rng, batch)
    got = ops.paged_attention(q, batch.cache, **(batch.meta | {"block_table": table}))
    assert_close(got, attend64(batch, q)[0])


def test_a_request_is_bitwise_the_same_alone_and_among_others():
    rng = np.random.default_rng(61)
    batch = make_batch(rng, "cache_int8", cached=(21, 60, 3), new=(2, 5, 1)).fill(rng)
    q = queries(rng, batch)
    together = ops.paged_attention(q, batch.cache, **batch.meta)
    alone = ops.paged_attention(
        q[batch.rows(1)],
        batch.cache,
        cu_seqlens_q=np.array([0, 5], np.int32),
        cache_seqlens=batch.cache_seqlens[1:2],
        block_table=batch.block_table[1:2],
    )
    assert_same_bits(alone, together[batch.rows(1)])


# --- sinks and LSE ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_sinks_join_the_denominator_and_not_the_lse(variant):
    rng = np.random.default_rng(67)
    batch = make_batch(rng, *variant).fill(rng)
    q = queries(rng, batch)
    sinks = np.array([-3, 0, 2, 5, 60, -60], np.float32)
    _, lse = assert_attends(batch, q, sinks=sinks)
    without, same = ops.paged_attention(q, batch.cache, **batch.meta, return_lse=True)
    assert_same_bits(lse, same)
    assert np.abs(without).max() > 0.1


def test_sinks_of_minus_infinity_change_nothing_and_of_infinity_take_all():
    rng = np.random.default_rng(71)
    batch = make_batch(rng).fill(rng)
    q = queries(rng, batch)
    without = ops.paged_attention(q, batch.cache, **batch.meta)
    none = ops.paged_attention(q, batch.cache, **batch.meta, sinks=np.full(6, -np.inf, np.float32))
    assert_same_bits(none, without)
    every = ops.paged_attention(q, batch.cache, **batch.meta, sinks=np.full(6, np.inf, np.float32))
    assert not every.any()


@pytest.mark.parametrize("sink", [-math.inf, -5.0, 0.0, math.inf])
def test_an_empty_row_is_zero_with_any_sink(sink):
    rng = np.random.default_rng(73)
    batch = make_batch(rng, "cache_int4_zp").fill(rng)
    sinks = np.full(6, sink, np.float32)
    intervals = np.zeros((14, 2), np.int32)
    out, lse = assert_attends(batch, queries(rng, batch), sinks=sinks, mask_offsets=intervals)
    assert not bits(out).any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("soft_cap", [None, 2.5])
def test_two_halves_merge_into_the_whole(variant, soft_cap):
    rng = np.random.default_rng(79)
    batch = make_batch(rng, *variant, cached=(25, 0, 7), new=(3, 5, 1)).fill(rng)
    q = queries(rng, batch)
    cuts = rng.integers(0, np.repeat(batch.lengths, batch.new) + 1)
    ends = np.repeat(batch.lengths, batch.new)
    halves = []
    for start, stop in ((np.zeros_like(cuts), cuts), (cuts, ends)):
        intervals = np.stack([start, stop], axis=1).astype(np.int32)
        halves += ops.paged_attention(
            q, batch.cache, **batch.meta, soft_cap=soft_cap, mask_offsets=intervals, return_lse=True
        )
    out, lse = ops.merge_states(*halves)
    want, want_lse = attend64(batch, q, soft_cap=soft_cap)
    assert_close(out, want, batch.format)
    assert_close(lse, want_lse, batch.format)
    # A sink is applied once, to the merged state.
    sinks = floats(rng, 6)
    with_sinks = out / (1 + np.exp(sinks - lse))[..., None]
    assert_close(with_sinks, attend64(batch, q, soft_cap=soft_cap, sinks=sinks)[0], batch.format)


# --- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_results_come_in_the_dtype_of_q(dtype):
    rng = np.random.default_rng(83)
    batch = make_batch(rng).fill(rng)
    q = queries(rng, batch, dtype)
    out = ops.paged_attention(q, batch.cache, **batch.meta)
    assert out.dtype == q.dtype
    assert_close(out, attend64(batch, q)[0])
    again, lse = ops.paged_attention(q, batch.cache, **batch.meta, return_lse=True)
    assert_same_bits(again, out)
    assert lse.shape == (14, 6)


def test_scores_are_float32_not_the_dtype_of_q():
    # Queries of one step: bfloat16 scores would round away what tells the keys apart.
    rng = np.random.default_rng(89)
    batch = make_batch(rng, cached=(300,), new=(1,), head_dim=256).fill(rng)
    q = queries(rng, batch, "bfloat16", scale=3.0)
    _, lse = ops.paged_attention(q, batch.cache, **batch.meta, return_lse=True)
    assert_close(lse, attend64(batch, q)[1])


def test_each_reading_multiplier_reaches_the_result():
    rng = np.random.default_rng(97)
    batch = make_batch(rng, "cache_int4_zp").fill(rng)
    q = queries(rng, batch)
    base = ops.paged_attention(q, batch.cache, **batch.meta)
    for field in ("k_dequant", "v_dequant", "k_zp", "v_zp", "k_quant", "v_quant"):
        static = batch.cache.static
        other = replace(static, **{field: getattr(static, field) * np.float32(1.3)})
        changed = ops.paged_attention(q, replace(batch.cache, static=other), **batch.meta)
        assert np.array_equal(changed, base) == field.endswith("_quant"), field
