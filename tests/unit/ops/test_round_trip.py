# SPDX-License-Identifier: Apache-2.0
"""What `rope_write_kv` stores, `gather_kv` reads: any values, any batch, every format."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastkv import ops
from helpers import oracle
from helpers.batches import VARIANTS, make_batch, running_sum, snapshot
from helpers.compare import assert_same_bits


def write_and_gather(batch, counts, gap=1):
    """K and V of all tokens, in float32, in segments with rows of nobody before and behind."""
    ops.rope_write_kv(batch.qkv, batch.cache, **batch.meta)
    sums = running_sum(counts, gap)
    out = np.full((2, sums[-1] + gap, *batch.heads()[1].shape[1:]), np.nan, np.float32)
    ops.gather_kv(
        batch.cache,
        cache_seqlens=np.array(batch.lengths, np.int32),
        block_table=batch.block_table,
        cu_seqlens_k=sums,
        out_k=out[0],
        out_v=out[1],
    )
    return sums, out


def stored_and_read(batch, side, x):
    """`x` through the oracle's quantization and back."""
    static, spec = batch.cache.static, batch.cache.spec
    fields = {} if static is None else {n: getattr(static, f"{side}_{n}") for n in ("quant", "zp")}
    dtypes = {"dtype": spec.dtype, "scale_dtype": spec.scale_dtype}
    stored, scale = oracle.quantize(batch.format, x, **fields, **dtypes)
    fields["dequant"] = None if static is None else getattr(static, f"{side}_dequant")
    fields.pop("quant", None)
    return oracle.dequantize(batch.format, stored, scale=scale, **fields, **dtypes)


def assert_round_trip(batch):
    """Every new token comes back as the oracle's, and nothing else was touched."""
    before = snapshot(batch.cache)
    sums, out = write_and_gather(batch, batch.lengths)
    heads = dict(zip("kv", batch.heads()[1:], strict=True))
    for b, cached in enumerate(batch.cached):
        for side, got in zip("kv", out, strict=True):
            want = stored_and_read(batch, side, heads[side][batch.rows(b)])
            mine = got[sums[b] + cached : sums[b + 1]]
            np.testing.assert_array_equal(mine, want.astype(np.float32))
    assert np.isnan(out[:, [0, -1]]).all(), "a row of nobody was written"
    written = np.zeros(batch.cache.k.shape[:3:2], bool)
    for page, slot in batch.owned_slots("new"):
        written[page, slot] = True
    for name, want in before.items():
        got = np.moveaxis(getattr(batch.cache, name), 2, 1)
        assert_same_bits(got[~written], np.moveaxis(want, 2, 1)[~written])


@settings(max_examples=60, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    variant=st.sampled_from(VARIANTS),
    requests=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), min_size=1, max_size=4),
    page_size=st.sampled_from([1, 3, 16]),
    dtypes=st.tuples(*[st.sampled_from(["bfloat16", "float16", "float32"])] * 4),
)
def test_any_batch(seed, variant, requests, page_size, dtypes):
    cached, new = zip(*requests, strict=True)
    rng = np.random.default_rng(seed)
    names = ("dtype", "qkv_dtype", "scale_dtype", "static_dtype")
    batch = make_batch(
        rng,
        *variant,
        cached=cached,
        new=new,
        head_dim=16,
        page_size=page_size,
        **dict(zip(names, dtypes, strict=True)),
    ).fill(rng, "cached")
    assert_round_trip(batch)


any_heads = arrays(np.float32, (2, 3, 8), elements=st.floats(width=32), fill=st.nothing())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=40, database=None)
@given(heads=any_heads)
@example(np.zeros((2, 3, 8), np.float32))
@example(np.full((2, 3, 8), np.float32(-np.inf)))
@example(np.full((2, 3, 8), np.float32(np.nan)))
def test_any_value(variant, heads):
    rng = np.random.default_rng(3)
    batch = make_batch(rng, *variant, cached=(1,), new=(2,), kv_heads=1, group=1, head_dim=8)
    batch.qkv[:] = heads.reshape(2, 24)
    assert_round_trip(batch.fill(rng, "cached"))
