# SPDX-License-Identifier: Apache-2.0
"""`gather_kv`: dequantized prefixes, bitwise, in rows that belong to them."""

import numpy as np
import pytest

from fastkv import ops
from helpers import oracle
from helpers.batches import (
    VARIANTS,
    case_id,
    covering_cases,
    floats,
    make_batch,
    running_sum,
    snapshot,
)
from helpers.compare import assert_close, assert_same_bits, bits


def gather(batch, cu_seqlens_k, out_k, out_v, cache=None):
    ops.gather_kv(
        cache or batch.cache,
        cache_seqlens=batch.cache_seqlens,
        block_table=batch.block_table,
        cu_seqlens_k=cu_seqlens_k,
        out_k=out_k,
        out_v=out_v,
    )


def expected(batch, side, cu_seqlens_k, out):
    """The bits of `out` after every cached token went to its row; -1 pages read as 0."""
    want = bits(out)
    for b, cached in enumerate(batch.cached):
        if cu_seqlens_k[b + 1] > cu_seqlens_k[b]:
            held = np.nan_to_num(batch.held(side, b)[:cached])
            want[cu_seqlens_k[b] : cu_seqlens_k[b] + cached] = oracle.to_bits(held, out.dtype.name)
    return want


@pytest.mark.parametrize("case", covering_cases(), ids=case_id)
def test_every_row_is_the_oracles_and_no_other_is_written(case):
    rng = np.random.default_rng(3)
    out_dtype = case["qkv_dtype"]
    batch = make_batch(rng, cached=(40, 0, 17, 300), new=(2, 1, 0, 3), **case).fill(rng)
    cu_seqlens_k = running_sum([43, 0, 17, 303], 2)
    shape = (2, cu_seqlens_k[-1] + 4, case["kv_heads"], case["head_dim"])
    out_k, out_v = floats(rng, shape, out_dtype)
    want_k, want_v = (expected(batch, s, cu_seqlens_k, o) for s, o in (("k", out_k), ("v", out_v)))
    before = snapshot(batch.cache)
    gather(batch, cu_seqlens_k, out_k, out_v)
    assert_same_bits(out_k, want_k)
    assert_same_bits(out_v, want_v)
    for name, tensor in before.items():
        assert_same_bits(getattr(batch.cache, name), tensor)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_exact_arithmetic_is_within_the_rounding_of_float32(variant):
    rng = np.random.default_rng(5)
    batch = make_batch(rng, *variant, cached=(50,), new=(0,)).fill(rng)
    out_k, out_v = np.full((2, 50, 2, 64), np.nan, np.float32)
    gather(batch, running_sum([50]), out_k, out_v)
    assert_close(out_k, batch.held("k", 0), variant[0], reads=True)
    assert_close(out_v, batch.held("v", 0), variant[0], reads=True)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_tokens_on_absent_pages_read_as_zero(variant):
    rng = np.random.default_rng(7)
    batch = make_batch(rng, *variant, cached=(40, 300), new=(0, 0), page_size=8).fill(rng)
    batch.block_table[0, [0, 3]] = -1
    batch.block_table[1, 36] = -1  # in the second chunk
    out_k, out_v = np.full((2, 340, 2, 64), np.nan, np.float32)
    gather(batch, running_sum([40, 300]), out_k, out_v)
    for out in (out_k, out_v):
        absent = np.concatenate([out[0:8], out[24:32], out[328:336]])
        assert bits(absent).max() == 0
    assert_same_bits(out_k, expected(batch, "k", running_sum([40, 300]), out_k))
    assert_same_bits(out_v, expected(batch, "v", running_sum([40, 300]), out_v))


def test_a_request_without_a_segment_is_left_out_whatever_its_table_says():
    rng = np.random.default_rng(11)
    batch = make_batch(rng, "cache_int8", cached=(20, 9), new=(0, 0)).fill(rng)
    batch.block_table[0] = 10_000
    out_k, out_v = np.full((2, 9, 2, 64), np.nan, np.float32)
    gather(batch, np.array([0, 0, 9], np.int32), out_k, out_v)
    assert_same_bits(out_k, oracle.to_bits(batch.held("k", 1), "float32"))


@pytest.mark.parametrize(("requests", "rows"), [(0, 5), (2, 0)])
def test_empty_input_writes_nothing(requests, rows):
    rng = np.random.default_rng(13)
    batch = make_batch(rng, cached=(3,) * requests, new=(0,) * requests)
    out_k, out_v = floats(rng, (2, rows, 2, 64))
    want = bits(out_k), bits(out_v)
    gather(batch, np.zeros(requests + 1, np.int32), out_k, out_v)
    assert_same_bits(out_k, want[0])
    assert_same_bits(out_v, want[1])


def test_nothing_cached_writes_nothing():
    rng = np.random.default_rng(17)
    batch = make_batch(rng, cached=(0, 0), new=(3, 2))
    out_k, out_v = floats(rng, (2, 5, 2, 64))
    want = bits(out_k)
    gather(batch, running_sum([3, 2]), out_k, out_v)
    assert_same_bits(out_k, want)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_chunks_of_any_size_give_the_same_bits(variant, monkeypatch):
    rng = np.random.default_rng(19)
    batch = make_batch(rng, *variant, cached=(70, 33), new=(0, 0), page_size=4).fill(rng)
    results = []
    for chunk in (256, 1, 12):
        monkeypatch.setattr("fastkv.ops.reference.paging.CHUNK_TOKENS", chunk)
        out_k, out_v = np.full((2, 103, 2, 64), np.nan, np.float32)
        gather(batch, running_sum([70, 33]), out_k, out_v)
        results.append((out_k, out_v))
    for out_k, out_v in results:
        assert_same_bits(out_k, expected(batch, "k", running_sum([70, 33]), out_k))
        assert_same_bits(out_v, results[0][1])
