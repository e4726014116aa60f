# SPDX-License-Identifier: Apache-2.0
"""`masked_attention` against float64: intervals, causality, contiguous K and V."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkv import ops
from helpers import oracle
from helpers.batches import floats, running_sum
from helpers.compare import assert_close, assert_same_bits, bits

NAN = math.nan


class Case(NamedTuple):
    """Contiguous K and V with rows of nobody, NaN there."""

    q: Any
    k: Any
    v: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any

    def run(self, **options):
        options.setdefault("out", np.full(self.q.shape, NAN).astype(self.q.dtype))
        return ops.masked_attention(
            self.q,
            self.k,
            self.v,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
            return_lse=True,
            **options,
        )

    def requests(self):
        for b in range(len(self.cu_seqlens_q) - 1):
            yield slice(*self.cu_seqlens_q[b : b + 2]), slice(*self.cu_seqlens_k[b : b + 2])

    def run64(self, *, causal=True, window=None, scale=None, mask_offsets=None, **shape):
        out = np.zeros(self.q.shape)
        out[: self.cu_seqlens_q[0]] = NAN
        lse = np.full(self.q.shape[:2], -np.inf)
        scale = self.q.shape[2] ** -0.5 if scale is None else scale
        for rows, own in self.requests():
            intervals = None if mask_offsets is None else mask_offsets[rows]
            n, length = rows.stop - rows.start, own.stop - own.start
            mask = oracle.visible_mask(n, length, causal, window, intervals)
            out[rows], lse[rows] = oracle.attention(
                self.q[rows], self.k[own], self.v[own], mask, scale, **shape
            )
        return out, lse

    def intervals(self, rng):
        """Random intervals `[T, 2]`, garbage for rows of nobody."""
        made = np.full((len(self.q), 2), -7, np.int32)
        for rows, own in self.requests():
            shape = (rows.stop - rows.start, 2)
            made[rows] = np.sort(rng.integers(0, own.stop - own.start + 1, shape), axis=1)
        return made

    def check(self, **options):
        got, lse = self.run(**options)
        want, want_lse = self.run64(**options)
        assert_close(got, want)
        assert_close(lse, want_lse)
        return got, lse


def make(
    rng, new, lengths, *, group=3, kv_heads=2, dim=32, dtype="float32", kv_dtype=None, edges=(0, 0)
):
    cu_q, cu_k = running_sum(new, edges[0]), running_sum(lengths, edges[0])
    q = floats(rng, (cu_q[-1] + edges[1], kv_heads * group, dim), dtype)
    k, v = floats(rng, (2, cu_k[-1] + edges[1], kv_heads, dim), kv_dtype or dtype)
    v += np.asarray(0.5, v.dtype)
    for array in (q, k, v):
        array[: edges[0]] = NAN
        array[len(array) - edges[1] :] = NAN
    return Case(q, k, v, cu_q, cu_k)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_matches_float64(dtype, dim, group):
    rng = np.random.default_rng(3)
    make(rng, [5, 0, 1, 3], [5, 4, 40, 12], group=group, dim=dim, dtype=dtype).check()


@settings(max_examples=60, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    requests=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=0, max_size=4),
    heads=st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 8])),
    options=st.fixed_dictionaries(
        {
            "causal": st.booleans(),
            "window": st.sampled_from([None, 1, 3, 10**9]),
            "soft_cap": st.sampled_from([None, 0.8]),
            "scale": st.sampled_from([None, 0.5]),
        }
    ),
    extras=st.tuples(st.booleans(), st.booleans()),
    edges=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    scores=st.sampled_from([1, 64, 1 << 24]),
)
def test_random_batches(seed, requests, heads, options, extras, edges, scores):
    rng = np.random.default_rng(seed)
    new, lengths = [n for n, _ in requests], [length for _, length in requests]
    case = make(rng, new, lengths, kv_heads=heads[0], group=heads[1], dim=8, edges=edges)
    options["sinks"] = floats(rng, heads[0] * heads[1]) if extras[0] else None
    options["mask_offsets"] = case.intervals(rng) if extras[1] else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkv.ops.reference.attend._SCORES", scores)
        patch.setattr("fastkv.ops.reference.masked_attention.ContiguousKeys.chunk", 7)
        case.check(**options)


def test_more_rows_than_keys_leaves_the_first_rows_empty():
    rng = np.random.default_rng(5)
    out, lse = make(rng, [5, 3], [2, 0]).check()
    assert not bits(out[[0, 1, 2, 5, 6, 7]]).any()
    assert np.isneginf(lse[[0, 1, 2, 5, 6, 7]]).all()
    assert np.isfinite(lse[3:5]).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("sinks", [False, True])
def test_intervals_intersect_with_causality_and_window(causal, window, sinks):
    rng = np.random.default_rng(7)
    case = make(rng, [9, 4], [20, 4], edges=(1, 2))
    intervals = case.intervals(rng)
    intervals[1:4] = [[0, 20], [4, 4], [19, 20]]  # all; none; a key behind the row
    case.check(
        causal=causal,
        window=window,
        mask_offsets=intervals,
        sinks=floats(rng, 6) if sinks else None,
    )


def test_disjoint_intervals_of_one_tile_have_gaps():
    # Key 8 lies between what the rows see: its NaN reaches none of them.
    rng = np.random.default_rng(11)
    case = make(rng, [2], [20])
    case.k[8], case.v[8] = NAN, NAN
    intervals = np.array([[0, 8], [9, 20]], np.int32)
    out, _ = case.check(causal=False, mask_offsets=intervals)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_a_key_that_is_not_finite_reaches_the_rows_that_see_it_alone(side, value):
    rng = np.random.default_rng(13)
    case = make(rng, [6], [12])
    getattr(case, side)[8, 0, 3] = value
    out, lse = case.run()
    want, want_lse = case.run64()
    blind = slice(0, 2)
    assert np.isfinite(out[blind]).all()
    assert_close(out[blind], want[blind])
    assert_close(lse[blind], want_lse[blind])
    np.testing.assert_array_equal(np.isnan(out), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(out), np.isinf(want))


def test_a_nan_query_stays_in_its_row_and_head():
    rng = np.random.default_rng(17)
    case = make(rng, [4], [9])
    case.q[2, 1, 0] = NAN
    out, lse = case.run()
    assert np.argwhere(np.isnan(lse)).tolist() == [[2, 1]]
    assert np.isnan(out[2, 1]).all()
    assert np.isnan(out).sum() == 32


def test_other_requests_keys_never_matter():
    rng = np.random.default_rng(19)
    case = make(rng, [3, 2, 4], [9, 6, 4])
    out, lse = case.run()
    case.k[9:15], case.v[9:15] = NAN, NAN
    again, lse_again = case.run()
    for rows in (slice(0, 3), slice(5, 9)):
        assert_same_bits(again[rows], out[rows])
        assert_same_bits(lse_again[rows], lse[rows])
    assert np.isnan(again[3:5]).all()


def test_long_prefill_crosses_tiles_of_rows_and_chunks_of_keys(monkeypatch):
    rng = np.random.default_rng(23)
    case = make(rng, [90, 70], [90, 110], dim=16)
    monkeypatch.setattr("fastkv.ops.reference.attend._SCORES", 6 * 110 * 8)
    monkeypatch.setattr("fastkv.ops.reference.masked_attention.ContiguousKeys.chunk", 32)
    case.check()
    case.check(window=40, mask_offsets=case.intervals(rng))


def test_the_real_chunk_is_crossed():
    rng = np.random.default_rng(29)
    case = make(rng, [3], [600], dim=8)
    case.check()
    case.check(window=300)


def test_k_and_v_may_be_wider_than_q():
    rng = np.random.default_rng(31)
    case = make(rng, [4], [9], dtype="bfloat16", kv_dtype="float32")
    out, _ = case.check()
    assert out.dtype.name == "bfloat16"


@pytest.mark.parametrize("rows", [0, 3])
def test_no_requests(rows):
    rng = np.random.default_rng(37)
    case = make(rng, [], [], edges=(0, rows))
    out, lse = case.check()
    assert out.shape == (rows, 6, 32)
    assert not bits(out).any()
    assert np.isneginf(lse).all()


def test_zero_rows_with_keys():
    out, lse = make(np.random.default_rng(41), [0, 0], [3, 5]).check()
    assert out.shape == (0, 6, 32)
    assert lse.shape == (0, 6)


def test_without_out_it_makes_one_and_returns_it_alone():
    rng = np.random.default_rng(43)
    case = make(rng, [4], [9], dtype="float16")
    out = ops.masked_attention(*case[:3], cu_seqlens_q=case[3], cu_seqlens_k=case[4])
    assert out.dtype == np.float16
    assert_same_bits(out, case.run()[0])
