# SPDX-License-Identifier: Apache-2.0
"""Strides, shared buffers, bytes as uint8, and caches past 2^32 elements: the same bits."""

from dataclasses import replace

import numpy as np
import pytest

from fastkv import CacheSpec, LayerCache, ops
from helpers import oracle
from helpers.batches import (
    FORMATS,
    clone,
    floats,
    make_batch,
    put_token,
    running_sum,
    static_scales,
    tensors_of,
)
from helpers.calls import OPS, legal_call
from helpers.compare import assert_close, assert_same_bits, bits, relative_error


def interleaved_sides(cache):
    """K and V as halves of one buffer `[N, 2, ...]`; scales too."""
    changed = {}
    for names in (("k", "v"), ("k_scale", "v_scale")):
        if getattr(cache, names[0]) is not None:
            buffer = np.stack([getattr(cache, n) for n in names], axis=1)
            changed |= {n: buffer[:, i] for i, n in enumerate(names)}
    return replace(cache, **changed)


def token_major(cache):
    """NHD storage, `[N, P, Hkv, D_storage]`, seen as `[N, Hkv, P, D_storage]`."""
    return replace(
        cache,
        **{
            name: np.ascontiguousarray(tensor.swapaxes(1, 2)).swapaxes(1, 2)
            for name, tensor in tensors_of(cache).items()
        },
    )


def every_other_element(cache):
    """A last axis with a step of two items."""
    return replace(
        cache, **{name: np.repeat(t, 2, axis=-1)[..., ::2] for name, t in tensors_of(cache).items()}
    )


def backwards(cache):
    """Pages in falling addresses."""
    return replace(cache, **{name: t[::-1].copy()[::-1] for name, t in tensors_of(cache).items()})


def as_bytes(cache):
    """uint8 where an array library lacks the storage dtype."""
    return replace(cache, k=cache.k.view(np.uint8), v=cache.v.view(np.uint8))


LAYOUTS = (interleaved_sides, token_major, every_other_element, backwards)


def run_all(batch, cache, q):
    """Every paged op in turn; the results, and the cache as it is left."""
    rows = sum(batch.cached)
    cu_seqlens_k = running_sum(batch.cached)
    kv, dim = cache.spec.num_kv_heads, cache.spec.head_dim
    out_k, out_v = np.full((2, rows, kv, dim), np.nan, np.float32)
    written = ops.rope_write_kv(batch.qkv, cache, **batch.meta, rope=batch.rope)
    ops.gather_kv(
        cache,
        cache_seqlens=batch.cache_seqlens,
        block_table=batch.block_table,
        cu_seqlens_k=cu_seqlens_k,
        out_k=out_k,
        out_v=out_v,
    )
    attended = ops.paged_attention(q, cache, **batch.meta)
    pages = len(cache.k)
    ops.copy_pages(cache, np.array([0], np.int32), np.array([pages - 1], np.int32))
    return written, out_k, out_v, attended


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strided_caches_are_served(layout, fmt, dtype):
    rng = np.random.default_rng(3)
    batch = make_batch(rng, fmt, dtype=dtype, scale_dtype=dtype).fill(rng, "cached")
    q = floats(rng, (len(batch.qkv), 6, 64))
    strided = layout(clone(batch.cache))
    assert not any(tensor.flags.c_contiguous for tensor in tensors_of(strided).values())
    want = run_all(batch, batch.cache, q)
    got = run_all(batch, strided, q)
    for mine, theirs in zip(got, want, strict=True):
        assert_same_bits(mine, theirs)
    for name, tensor in tensors_of(batch.cache).items():
        assert_same_bits(getattr(strided, name), tensor)


@pytest.mark.parametrize("fmt", ["cache_int8", "cache_fp8", "cache_int4_zp", "block_wise_fp8"])
@pytest.mark.parametrize("layout", [None, *LAYOUTS], ids=lambda f: getattr(f, "__name__", "plain"))
def test_bytes_are_accepted_for_one_byte_formats(fmt, layout):
    rng = np.random.default_rng(5)
    batch = make_batch(rng, fmt).fill(rng, "cached")
    q = floats(rng, (len(batch.qkv), 6, 64))
    raw = as_bytes(clone(batch.cache))
    raw = raw if layout is None else layout(raw)
    assert raw.k.dtype == np.uint8
    for mine, theirs in zip(run_all(batch, raw, q), run_all(batch, batch.cache, q), strict=True):
        assert_same_bits(mine, theirs)
    for name, tensor in tensors_of(batch.cache).items():
        assert_same_bits(getattr(raw, name), tensor)


def spread(array):
    """The same values, in every other place of a larger array, axes reversed in memory."""
    wide = np.zeros(tuple(2 * n for n in array.shape[::-1]), array.dtype).T
    view = wide[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


@pytest.mark.parametrize("fmt", ["block_wise_fp8", "cache_int4_zp"])
@pytest.mark.parametrize("op", OPS)
def test_every_argument_may_be_strided(op, fmt):
    plain, strided = legal_call(op, fmt), legal_call(op, fmt)
    for name, array in strided.arrays().items():
        strided[name] = spread(array)
        assert not strided[name].flags.c_contiguous
    results = []
    for call in (plain, strided):
        result = call.run()
        results.append(
            [] if result is None else list(result) if type(result) is tuple else [result]
        )
    written = [call.arrays() for call in (plain, strided)]
    want, got = ([*r, *w.values()] for r, w in zip(results, written, strict=True))
    for mine, theirs in zip(got, want, strict=True):
        if mine.dtype == np.float32 and op.endswith("attention"):
            # BLAS adds up strided operands in another order.
            assert_close(mine, theirs.astype(np.float64))
        else:
            assert_same_bits(mine, theirs)


def test_non_contiguous_out_is_the_one_that_comes_back():
    rng = np.random.default_rng(7)
    batch = make_batch(rng).fill(rng)
    q = floats(rng, (14, 6, 64))
    want = ops.paged_attention(q, batch.cache, **batch.meta)
    buffer = np.full((6, 14, 64), np.nan, np.float32)
    out = buffer.swapaxes(0, 1)
    assert ops.paged_attention(q, batch.cache, **batch.meta, out=out) is out
    assert_same_bits(buffer.swapaxes(0, 1), want)


@pytest.mark.parametrize("fmt", ["cache_int8", "block_wise_fp8"])
def test_a_cache_past_two_to_the_32_elements(fmt):
    """Lazily mapped zeros of 4.3 GB a side; only the last pages become memory."""
    rng = np.random.default_rng(11)
    spec = CacheSpec(1, 8, 128, 64, fmt)
    pages = 2**32 // (8 * 128 * 64) + 3
    static = static_scales(rng, fmt, 8, 128)
    tensors = {
        t.name: np.zeros(t.shape, t.dtype)
        for t in spec.layer_tensors(0, pages)
        if not t.dtype.startswith("float8")
    }
    for name in ("k", "v"):
        tensors.setdefault(name, np.zeros((pages, 8, 64, 128), np.uint8))
    cache = LayerCache(spec, 0, **tensors, static=static)
    assert cache.k.size > 2**32
    small = clone(replace(cache, **{name: tensor[-3:] for name, tensor in tensors.items()}))
    high = np.array([[pages - 1, pages - 3]], np.int32)
    qkv = floats(rng, (70, 24 * 128))
    meta = {
        "cu_seqlens_q": np.array([0, 70], np.int32),
        "cache_seqlens": np.array([20], np.int32),
    }
    for where, table in ((cache, high), (small, high - np.int32(pages - 3))):
        ops.rope_write_kv(qkv, where, block_table=table, **meta)
    for name, tensor in tensors.items():
        assert_same_bits(tensor[-3:], getattr(small, name))
    # Where a 32-bit offset would have wrapped to.
    assert not bits(cache.k[:3]).any()
    read = oracle.read_cache(cache, "k", high[0], 90)[20:]
    k = qkv.reshape(70, 24, 128)[:, 8:16]
    assert relative_error(read, k) < 0.05
    q = floats(rng, (70, 8, 128))
    assert_same_bits(
        ops.paged_attention(q, cache, block_table=high, **meta),
        ops.paged_attention(q, small, block_table=high - np.int32(pages - 3), **meta),
    )
    ops.copy_pages(cache, high[0, :1], np.array([pages - 2], np.int32))
    assert_same_bits(cache.v[-2], cache.v[-1])


def test_the_results_do_not_alias_the_inputs():
    for op in OPS:
        call = legal_call(op)
        arrays = call.arrays()
        result = call.run()
        results = [] if result is None else list(result) if isinstance(result, tuple) else [result]
        for array in results:
            assert not any(
                np.shares_memory(array, other) for name, other in arrays.items() if name != "out"
            )


def test_put_token_and_read_cache_agree_on_where_a_token_lies():
    rng = np.random.default_rng(13)
    batch = make_batch(rng, "none", cached=(0,), new=(3,))
    k, v = rng.standard_normal((2, 2, 64)).astype(np.float32)
    put_token(batch.cache, int(batch.block_table[0, 0]), 2, k, v)
    np.testing.assert_array_equal(batch.held("k", 0)[2], k)
    np.testing.assert_array_equal(batch.held("v", 0)[2], v)
