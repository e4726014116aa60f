# SPDX-License-Identifier: Apache-2.0
"""`rope_write_kv` against the oracle: every byte of the cache, owned by a token or not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkv import ops
from helpers import oracle
from helpers.batches import (
    VARIANTS,
    case_id,
    clone,
    covering_cases,
    floats,
    make_batch,
    put_token,
    tensors_of,
)
from helpers.compare import assert_rotated, assert_same_bits, bits


def write(batch, **kwargs):
    return ops.rope_write_kv(batch.qkv, batch.cache, **batch.meta, **kwargs)


def expected(batch, k, v, before):
    """The cache after the oracle wrote rows of K and V `[T, Hkv, D]` over a copy of it."""
    want = clone(before)
    for b, i, page, slot in batch.owned("new"):
        row = batch.rows(b).start + i - batch.cached[b]
        put_token(want, page, slot, k[row], v[row])
    return want


def assert_same_cache(got, want):
    for name, tensor in tensors_of(want).items():
        assert_same_bits(getattr(got, name), tensor)


def positions(batch):
    """Position of each row; rows of nobody are at 0."""
    at = np.zeros(len(batch.qkv), int)
    for b, cached in enumerate(batch.cached):
        at[batch.rows(b)] = cached + np.arange(batch.new[b])
    return at


def rotated(batch, x, step=np.float64):
    at = positions(batch)
    rope = batch.rope
    return oracle.rope(x, rope.cos[at], rope.sin[at], rope.interleaved, step)


def in_batch(batch):
    mask = np.zeros(len(batch.qkv), bool)
    mask[int(batch.cu_seqlens_q[0]) : int(batch.cu_seqlens_q[-1])] = True
    return mask


def assert_written_as_the_oracle_writes(batch):
    """Rotation and quantization bitwise, each from the same float32 values."""
    before = clone(batch.cache)
    q, k, v = write(batch, rope=batch.rope, return_kv=True)
    qkv = batch.heads()
    want_q, want_k = rotated(batch, qkv[0], oracle.f32), rotated(batch, qkv[1], oracle.f32)
    dtype = batch.qkv.dtype.name
    mask = in_batch(batch)
    for got, want in ((q, want_q), (k, want_k), (v, qkv[2])):
        assert got.dtype == batch.qkv.dtype
        assert_same_bits(got, oracle.to_bits(np.where(mask[:, None, None], want, 0), dtype))
    assert_same_cache(batch.cache, expected(batch, want_k, qkv[2], before))


@pytest.mark.parametrize("case", covering_cases(), ids=case_id)
def test_every_byte_of_the_cache_is_the_oracles(case):
    rng = np.random.default_rng(7)
    assert_written_as_the_oracle_writes(make_batch(rng, **case))


@settings(max_examples=25, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    variant=st.sampled_from(VARIANTS),
    requests=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)), min_size=0, max_size=4),
    shape=st.tuples(
        st.sampled_from([1, 2, 3, 5]),
        st.sampled_from([1, 2, 3, 4, 8, 16]),
        st.sampled_from([8, 64, 96]),
        st.sampled_from([1, 3, 16, 32, 64, 128]),
    ),
    dtypes=st.tuples(*[st.sampled_from(["bfloat16", "float16", "float32"])] * 4),
    rows=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    rotary=st.tuples(st.sampled_from([None, 2, 6]), st.booleans()),
)
def test_random_batches(seed, variant, requests, shape, dtypes, rows, rotary):
    batch = make_batch(
        np.random.default_rng(seed),
        *variant,
        cached=[cached for cached, _ in requests],
        new=[new for _, new in requests],
        **dict(zip(("kv_heads", "group", "head_dim", "page_size"), shape, strict=True)),
        **dict(
            zip(("dtype", "qkv_dtype", "scale_dtype", "static_dtype"), dtypes, strict=True),
        ),
        first_row=rows[0],
        padding=rows[1],
        rotary_dim=rotary[0],
        interleaved=rotary[1],
    )
    assert_written_as_the_oracle_writes(batch)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 24, 64])
@pytest.mark.parametrize("norm_after_rope", [False, True])
@pytest.mark.parametrize("norms", ["q", "k", "qk", ""])
def test_norm_and_rope_against_float64(interleaved, rotary_dim, norm_after_rope, norms):
    rng = np.random.default_rng(11)
    batch = make_batch(rng, rotary_dim=rotary_dim, interleaved=interleaved)
    weights = {name: 1 + floats(rng, 64, scale=0.3) for name in norms}
    q, k, v = write(
        batch,
        rope=batch.rope,
        return_kv=True,
        norm_after_rope=norm_after_rope,
        norm_eps=1e-2,
        **{f"{name}_norm_weight": weight for name, weight in weights.items()},
    )
    for name, got, x in (("q", q, batch.heads()[0]), ("k", k, batch.heads()[1])):
        if name in weights and not norm_after_rope:
            x = oracle.rms_norm(x, weights[name], 1e-2)  # noqa: PLW2901 - step by step
        x = rotated(batch, x)  # noqa: PLW2901
        if name in weights and norm_after_rope:
            x = oracle.rms_norm(x, weights[name], 1e-2)  # noqa: PLW2901
        assert_rotated(got, x)
    assert_same_bits(v, batch.heads(np.float32)[2])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_is_quantized_is_float32_after_norm_and_rope(variant):
    # From bfloat16 activations: out_k in float32 shows the values before they are rounded.
    rng = np.random.default_rng(13)
    batch = make_batch(rng, *variant, qkv_dtype="bfloat16")
    before = clone(batch.cache)
    out_k, out_v = np.full((2, sum(batch.lengths), 2, 64), np.nan, np.float32)
    starts = np.cumsum([0, *batch.lengths]).astype(np.int32)
    _, k, _ = write(
        batch,
        rope=batch.rope,
        k_norm_weight=1 + floats(rng, 64, "bfloat16", 0.3),
        return_kv=True,
        out_k=out_k,
        out_v=out_v,
        cu_seqlens_k=starts,
    )
    exact_k, exact_v = np.zeros((2, len(batch.qkv), 2, 64))
    for b, cached in enumerate(batch.cached):
        own = slice(starts[b] + cached, starts[b + 1])
        exact_k[batch.rows(b)], exact_v[batch.rows(b)] = out_k[own], out_v[own]
    assert_same_bits(k, oracle.to_bits(exact_k, "bfloat16"))
    assert np.any(oracle.values_of(k) != exact_k)
    assert_same_cache(batch.cache, expected(batch, exact_k, exact_v, before))


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16", "float16"])
def test_out_k_and_out_v_get_the_new_tokens_behind_the_prefix(out_dtype):
    rng = np.random.default_rng(17)
    batch = make_batch(rng, "cache_int8", cached=(5, 3, 0, 8), new=(2, 4, 3, 0))
    # Request 1 takes no part; request 3 has no new token, and room to spare.
    cu_seqlens_k = np.array([1, 8, 8, 11, 21], np.int32)
    out_k, out_v = floats(rng, (2, 23, 2, 64), out_dtype)
    want_k, want_v = bits(out_k), bits(out_v)
    write(batch, rope=batch.rope, out_k=out_k, out_v=out_v, cu_seqlens_k=cu_seqlens_k)
    _, k, v = batch.heads()
    k = rotated(batch, k, oracle.f32)
    for b in (0, 2):
        first = cu_seqlens_k[b] + batch.cached[b]
        own = slice(first, first + batch.new[b])
        want_k[own] = oracle.to_bits(k[batch.rows(b)], out_dtype)
        want_v[own] = oracle.to_bits(v[batch.rows(b)], out_dtype)
    assert_same_bits(out_k, want_k)
    assert_same_bits(out_v, want_v)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_writes_to_page_minus_one_are_dropped_and_the_others_are_not(variant):
    rng = np.random.default_rng(19)
    batch = make_batch(rng, *variant, cached=(3, 30), new=(20, 5), page_size=8)
    batch.block_table[0, 1] = -1  # tokens 8 .. 15 of request 0
    before = clone(batch.cache)
    _, k, v = write(batch, rope=batch.rope, return_kv=True)
    assert_same_cache(batch.cache, expected(batch, k, v, before))
    # The rotated values come back all the same.
    assert_same_bits(k, oracle.to_bits(rotated(batch, batch.heads()[1], oracle.f32), "float32"))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_all_pages_absent_writes_nothing(variant):
    batch = make_batch(np.random.default_rng(23), *variant)
    batch.block_table[...] = -1
    before = clone(batch.cache)
    q = write(batch)
    assert_same_cache(batch.cache, before)
    assert_same_bits(q, batch.heads(np.float32)[0])


def test_rows_outside_the_batch_get_zero_and_leave_the_cache_alone():
    rng = np.random.default_rng(29)
    batch = make_batch(rng, "block_wise_fp8", new=(2, 0, 3), first_row=2, padding=3)
    batch.qkv[:2], batch.qkv[-3:] = np.nan, np.inf
    before = clone(batch.cache)
    q, k, v = write(batch, rope=batch.rope, return_kv=True)
    for got in (q, k, v):
        outside = np.concatenate([got[:2], got[-3:]])
        assert_same_bits(outside, np.zeros_like(outside))
        assert np.isfinite(got).all()
        assert got[2:-3].all()
    assert_same_cache(batch.cache, expected(batch, k, v, before))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_only_padding_rows(variant):
    # A captured batch with no live request: rows there are, owners there are none.
    batch = make_batch(np.random.default_rng(31), *variant, cached=(4, 0), new=(0, 0), padding=3)
    before = clone(batch.cache)
    q, k, v = write(batch, rope=batch.rope, return_kv=True)
    assert q.shape == (3, 6, 64)
    for got in (q, k, v):
        assert_same_bits(got, np.zeros_like(got))
    assert_same_cache(batch.cache, before)


@pytest.mark.parametrize("padding", [0, 2])
def test_no_requests(padding):
    batch = make_batch(np.random.default_rng(37), cached=(), new=(), padding=padding)
    before = clone(batch.cache)
    q = write(batch, rope=batch.rope)
    assert q.shape == (padding, 6, 64)
    assert not q.any()
    assert_same_cache(batch.cache, before)


def test_without_rope_and_norm_q_is_a_copy_of_its_heads():
    batch = make_batch(np.random.default_rng(41), qkv_dtype="bfloat16")
    q = write(batch)
    assert_same_bits(q, oracle.to_bits(batch.heads()[0], "bfloat16"))
    assert not np.shares_memory(q, batch.qkv)


def test_bits_do_not_depend_on_the_layout_of_qkv_nor_on_the_other_requests():
    rng = np.random.default_rng(43)
    weights = {f"{name}_norm_weight": floats(rng, 96) for name in "qk"}
    batch = make_batch(rng, "cache_int8", "channel", head_dim=96, new=(7, 4, 9))
    twin = batch.with_(cache=clone(batch.cache), qkv=np.asfortranarray(batch.qkv))
    q = write(batch, rope=batch.rope, **weights)
    assert_same_bits(write(twin, rope=batch.rope, **weights), q)
    assert_same_cache(twin.cache, batch.cache)
    alone = batch.with_(
        qkv=np.ascontiguousarray(batch.qkv[batch.rows(1)]),
        cu_seqlens_q=np.array([0, 4], np.int32),
        cache_seqlens=batch.cache_seqlens[1:2],
        block_table=batch.block_table[1:2],
    )
    assert_same_bits(write(alone, rope=batch.rope, **weights), q[batch.rows(1)])


def test_the_last_position_of_the_tables_is_served():
    batch = make_batch(np.random.default_rng(47), cached=(9,), new=(3,), rotary_dim=16)
    assert len(batch.rope.cos) == 12
    assert_written_as_the_oracle_writes(batch)
