# SPDX-License-Identifier: Apache-2.0
"""The rules of each format for odd values, by hand: written with `rope_write_kv`, read back."""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from fastkv import CacheSpec, StaticScales, ops
from helpers import oracle
from helpers.batches import (
    VARIANTS,
    clone,
    layer_cache,
    make_batch,
    put_token,
    static_scales,
    tensors_of,
)
from helpers.compare import assert_same_bits, bits

INF, NAN = math.inf, math.nan
TINY, HUGE = 2.0**-149, float(np.finfo(np.float32).max)
ONE = {"cu_seqlens_q": [0, 1], "cache_seqlens": [0], "block_table": [[0]]}


def one_head(fmt, quant=1.0, dequant=1.0, zp=0.0, *, dim=8, scale_dtype="float32", dtype="float32"):
    """A poisoned cache of one page of one token; multipliers of V differ from K's."""
    spec = CacheSpec(1, 1, dim, 1, fmt, dtype, scale_dtype)
    shape = (1, dim) if fmt == "cache_int4_zp" else (1,)
    static = None
    if spec.layer_quant(0).needs_static:
        values = {"k_quant": quant, "k_dequant": dequant, "v_quant": 3.0, "v_dequant": 0.3}
        values |= {"k_zp": zp, "v_zp": 1.0} if fmt == "cache_int4_zp" else {}
        static = StaticScales(**{n: np.full(shape, x, np.float32) for n, x in values.items()})
    return layer_cache(np.random.default_rng(3), spec, 1, static)


def write_one(cache, k, v=None):
    """Write one token and return nothing: the cache holds it."""
    k = np.asarray(k, np.float32)
    v = np.arange(len(k), dtype=np.float32) if v is None else np.asarray(v, np.float32)
    meta = {name: np.array(value, np.int32) for name, value in ONE.items()}
    ops.rope_write_kv(np.concatenate([k, k, v])[None], cache, **meta)


def read_one(cache):
    """K of the one token, dequantized."""
    out_k, out_v = np.full((2, 1, 1, cache.spec.head_dim), 77, np.float32)
    ops.gather_kv(
        cache,
        cache_seqlens=np.array([1], np.int32),
        block_table=np.array([[0]], np.int32),
        cu_seqlens_k=np.array([0, 1], np.int32),
        out_k=out_k,
        out_v=out_v,
    )
    return out_k[0, 0]


def stored(cache, name="k"):
    return bits(getattr(cache, name)).reshape(-1).tolist()


def test_int8_rounds_half_to_even_and_saturates_at_127_on_both_sides():
    cache = one_head("cache_int8", quant=2.0)
    write_one(cache, [0.25, 0.75, -0.75, 1.25, 63.75, -64, -HUGE, -0.0])
    assert stored(cache) == [0, 2, 256 - 2, 2, 127, 256 - 127, 256 - 127, 0]


def test_int8_stores_nan_as_0_and_inf_saturated():
    cache = one_head("cache_int8", quant=0.5)
    write_one(cache, [NAN, INF, -INF, 1e-30, -NAN, HUGE, 3.0, -3.0])
    assert stored(cache) == [0, 127, 256 - 127, 0, 0, 127, 2, 256 - 2]


def test_int8_multiplies_in_float32():
    # 0.7 * 5 is 3.5 in float32 (rounded up from 3.4999999...), which rounds to 4, not to 3.
    cache = one_head("cache_int8", quant=5.0)
    x = np.float32(0.7)
    assert float(x) * 5 < 3.5
    write_one(cache, [x] * 8)
    assert stored(cache) == [4] * 8


def test_fp8_saturates_and_keeps_nan_and_the_sign_of_zero():
    cache = one_head("cache_fp8", quant=2.0)
    write_one(cache, [INF, -INF, NAN, -NAN, 1000, -0.0, 0.0, -224])
    assert stored(cache) == [0x7E, 0xFE, 0x7F, 0x7F, 0x7E, 0x80, 0x00, 0xFE]


def test_fp8_rounds_to_nearest_even_and_not_to_an_integer_first():
    cache = one_head("cache_fp8")
    write_one(cache, [0.40625, 1.0625, 1.1875, 17, 19, 2**-10, 3 * 2**-10, 1.5 * 2**-9])
    #         0.40625 = 1.625/4; 1.0625 ties to 1; 1.1875 to 1.25; 17 to 16; 19 to 20; subnormals
    assert stored(cache) == [0x2D, 0x38, 0x3A, 0x58, 0x5A, 0x00, 0x02, 0x02]


def test_int4_saturates_and_stores_nan_as_its_zero_point():
    cache = one_head("cache_int4_zp", quant=1.0, zp=2.5, dim=8)
    write_one(cache, [INF, -INF, NAN, -NAN, 4.0, -10.5, -1.0, 0.0])
    codes = [7, -8, 2, 2, 6, -8, 2, 2]  # 6.5 -> 6, -8.0, 1.5 -> 2, 2.5 -> 2: to even
    packed = [
        (low & 15) | (high & 15) << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)
    ]
    assert stored(cache) == packed
    np.testing.assert_array_equal(read_one(cache), np.array(codes) - 2.5)


@pytest.mark.parametrize(("zp", "code"), [(9.0, 7), (-8.6, -8), (0.5, 0), (-1.5, -2)])
def test_int4_nan_is_the_rounded_clamped_zero_point(zp, code):
    cache = one_head("cache_int4_zp", zp=zp)
    write_one(cache, [NAN] * 8)
    assert stored(cache) == [(code & 15) * 17] * 4


def test_int4_rounds_the_sum_to_float32():
    # 5.5 - 2^-25 is 5.5 in float32, and a tie goes to 6.
    x = np.nextafter(np.float32(0.5), np.float32(0))
    assert float(x) + 5 < 5.5
    cache = one_head("cache_int4_zp", zp=5.0)
    write_one(cache, [x] * 8)
    assert stored(cache) == [0x66] * 4


def test_int4_rounds_the_product_before_it_adds_the_zero_point():
    # The exact product is above 6.5; a fused multiply-add would round 0.5000001 to 1.
    x, quant = np.float32(6.5) / np.float32(1.1), np.float32(1.1)
    assert x * quant == 6.5
    assert float(x) * float(quant) > 6.5
    cache = one_head("cache_int4_zp", quant=1.1, zp=-6.0)
    write_one(cache, [x] * 8)
    assert stored(cache) == [0x00] * 4


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_block_wise_fp8_stores_a_zero_row_as_zero_and_reads_zero(scale_dtype):
    cache = one_head("block_wise_fp8", scale_dtype=scale_dtype)
    write_one(cache, [0.0, -0.0] * 4)
    assert stored(cache) == [0] * 8
    assert stored(cache, "k_scale") == [0]
    assert bits(read_one(cache)).tolist() == [0] * 8
    assert stored(cache, "v_scale") != [0]


@pytest.mark.parametrize(
    ("scale_dtype", "smallest", "largest"),
    [
        ("float32", 2.0**-126, HUGE),
        ("bfloat16", 2.0**-126, (2 - 2**-7) * 2.0**127),
        ("float16", 2.0**-14, 65504.0),
    ],
)
def test_block_wise_fp8_keeps_the_scale_normal_and_finite(scale_dtype, smallest, largest):
    for k, scale in (
        ([TINY, -TINY] * 4, smallest),
        ([INF, 1.0, -INF, 0, 0, 0, 0, 0], largest),
        ([HUGE] + [0.0] * 7, min(largest, HUGE / 448)),
    ):
        cache = one_head("block_wise_fp8", scale_dtype=scale_dtype)
        write_one(cache, k)
        want = oracle.to_bits(scale, scale_dtype)
        assert stored(cache, "k_scale") == [int(want)]
        s = oracle.from_bits(want, scale_dtype)
        codes = oracle.to_e4m3(np.clip(oracle.f32(np.array(k) / s), -448, 448))
        assert stored(cache) == codes.tolist()


def test_block_wise_fp8_divides_by_the_rounded_scale():
    # amax / 448 rounds down in bfloat16, so amax / s is above 448 and saturates.
    k = np.array([449.0, -448.5, 448.0, 100, 3, 2, 1, 0.5])
    cache = one_head("block_wise_fp8", scale_dtype="bfloat16")
    write_one(cache, k)
    assert stored(cache, "k_scale") == [0x3F80]  # 1.0, from 1.0022
    assert stored(cache) == oracle.to_e4m3(np.clip(k, -448, 448)).tolist()


@pytest.mark.parametrize("s", [7, 13, 15, 41, 47])
def test_block_wise_fp8_divides_and_does_not_multiply_by_a_reciprocal(s):
    # x / s is a tie and goes to the even byte; x * (1 / s) lies beside some of them.
    ties = (oracle.E4M3[8:126] + oracle.E4M3[9:127]) / 2
    x = ties * s
    assert np.array_equal(x, oracle.f32(x))
    reciprocal = oracle.to_e4m3(oracle.f32(x * float(np.float32(1) / np.float32(s))))
    want = oracle.to_e4m3(ties)
    assert (reciprocal != want).any()
    cache = one_head("block_wise_fp8", dim=len(ties) + 1)
    write_one(cache, [*x, 448.0 * s])
    assert oracle.from_bits(np.uint32(stored(cache, "k_scale")), "float32") == s
    assert stored(cache) == [*want, 0x7E]


def test_block_wise_fp8_nan_makes_its_own_rows_scale_nan_and_no_other():
    rng = np.random.default_rng(7)
    batch = make_batch(rng, "block_wise_fp8", cached=(0,), new=(4,), group=1, kv_heads=2)
    kv = batch.qkv.reshape(4, 6, 64)
    kv[1, 2, 5] = NAN  # token 1, K head 0
    kv[2, 5, 0] = -NAN  # token 2, V head 1
    ops.rope_write_kv(batch.qkv, batch.cache, **batch.meta)
    page = batch.block_table[0, 0]
    for name, where in (("k_scale", (0, 1)), ("v_scale", (1, 2))):
        nan = np.isnan(getattr(batch.cache, name)[page, :, :4])
        assert np.argwhere(nan).tolist() == [list(where)]


ODD = [0.0, -0.0, TINY, -TINY, 2.0**-126, 1e-20, -1e20, HUGE, -HUGE, INF, -INF, NAN, 0.5, 1.5, -2.5]


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_rows_of_odd_values_are_stored_as_the_oracle_stores_them(variant, scale_dtype):
    rng = np.random.default_rng(11)
    batch = make_batch(
        rng, *variant, cached=(3,), new=(64,), scale_dtype=scale_dtype, dtype=scale_dtype
    )
    heads = batch.qkv.reshape(64, -1, 64)
    odd = rng.random(heads.shape) < np.linspace(0, 0.3, 64)[:, None, None]
    heads[odd] = rng.choice(np.array(ODD, np.float32), odd.sum())
    # Finite rows of every magnitude: scales of paged formats reach their limits.
    exponents = np.linspace(-149, 120, 32)[:, None, None]
    heads[:32] = np.where(odd[:32], 0, heads[:32]) * np.exp2(exponents).astype(np.float32) / 8
    want = clone(batch.cache)
    _, k, v = batch.heads()
    ops.rope_write_kv(batch.qkv, batch.cache, **batch.meta)
    for b, i, page, slot in batch.owned("new"):
        put_token(want, page, slot, k[i - batch.cached[b]], v[i - batch.cached[b]])
    for name, tensor in tensors_of(want).items():
        got = getattr(batch.cache, name)
        if tensor.dtype.itemsize > 1:  # which NaN a float16 or float32 holds is not fixed
            nan = np.isnan(tensor.astype(np.float32))
            np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
            got, tensor = (np.where(nan, 0, x.astype(np.float32)) for x in (got, tensor))  # noqa: PLW2901
        assert_same_bits(got, tensor)


@pytest.mark.parametrize("field", ["k_quant", "v_quant", "k_zp", "v_zp"])
def test_each_writing_multiplier_reaches_its_own_side_only(field):
    rng = np.random.default_rng(13)
    batch = make_batch(rng, "cache_int4_zp")
    changed = replace(
        batch.cache.static, **{field: 1.4 * getattr(batch.cache.static, field) + np.float32(0.2)}
    )
    first, second = clone(batch.cache), replace(clone(batch.cache), static=changed)
    for cache in (first, second):
        ops.rope_write_kv(batch.qkv, cache, **batch.meta)
    same = {
        name: np.array_equal(bits(t), bits(getattr(second, name)))
        for name, t in tensors_of(first).items()
    }
    assert same == {"k": field[0] != "k", "v": field[0] != "v"}


def test_dequant_multipliers_do_not_shape_what_is_written():
    rng = np.random.default_rng(17)
    batch = make_batch(rng, "cache_int8")
    static = batch.cache.static
    other = replace(static, k_dequant=9 * static.k_dequant, v_dequant=5 * static.v_dequant)
    first, second = clone(batch.cache), replace(clone(batch.cache), static=other)
    for cache in (first, second):
        ops.rope_write_kv(batch.qkv, cache, **batch.meta)
    for name, tensor in tensors_of(first).items():
        assert_same_bits(tensor, getattr(second, name))


def test_static_multipliers_in_half_precision_are_taken_at_their_float32_value():
    rng = np.random.default_rng(19)
    for dtype in ("bfloat16", "float16"):
        static = static_scales(rng, "cache_int4_zp", 2, 64, dtype=dtype)
        wide = static.map(lambda array: array.astype(np.float32))
        batch = make_batch(rng, "cache_int4_zp")
        first, second = (replace(clone(batch.cache), static=s) for s in (static, wide))
        for cache in (first, second):
            ops.rope_write_kv(batch.qkv, cache, **batch.meta)
        assert_same_bits(first.k, second.k)
        assert_same_bits(first.v, second.v)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_none_keeps_what_its_dtype_keeps(dtype):
    cache = one_head("none", dtype=dtype)
    x = np.array([NAN, INF, -INF, -0.0, 1 / 3, HUGE, TINY, 65520.0])
    write_one(cache, x)
    with np.errstate(over="ignore"):
        want = x.astype(np.float32).astype(cache.k.dtype)
    assert np.isnan(cache.k[0, 0, 0, 0].astype(np.float32))
    assert_same_bits(cache.k[0, 0, 0, 1:], want[1:])
    assert want.dtype.name == dtype
    assert ml_dtypes.finfo(cache.k.dtype).bits == 8 * cache.k.itemsize


def test_every_e4m3_byte_is_read_as_its_value_times_dequant():
    cache = one_head("cache_fp8", dequant=0.3, dim=256)
    cache.k.view(np.uint8)[0, 0, 0] = np.arange(256)
    want = oracle.f32(oracle.E4M3 * float(np.float32(0.3)))
    np.testing.assert_array_equal(read_one(cache), want)


def test_every_int4_byte_is_read_low_nibble_first():
    cache = one_head("cache_int4_zp", dequant=0.3, zp=1.7, dim=512)
    cache.k[0, 0, 0] = np.arange(256)
    want = oracle.dequantize(
        "cache_int4_zp", cache.k[0], dequant=cache.static.k_dequant, zp=cache.static.k_zp
    )
    np.testing.assert_array_equal(read_one(cache), want[0, 0])
    assert read_one(cache)[4] == np.float32(np.float32(2 - np.float32(1.7)) * np.float32(0.3))


def test_every_int8_byte_is_read_two_s_complement():
    cache = one_head("cache_int8", dequant=0.3, dim=256)
    cache.k.view(np.uint8)[0, 0, 0] = np.arange(256)
    signed = np.concatenate([np.arange(128), np.arange(-128, 0)])
    np.testing.assert_array_equal(read_one(cache), oracle.f32(signed * float(np.float32(0.3))))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[0] != "none"], ids=str)
def test_reading_back_errs_by_half_a_step(variant):
    # The largest error of K that a format's step allows, element by element.
    rng = np.random.default_rng(23)
    batch = make_batch(rng, *variant, cached=(0, 0), new=(20, 30), largest_zp=1.0)
    batch.qkv[...] = np.clip(batch.qkv, -2, 2)  # nothing saturates
    _, k, _ = batch.heads()
    ops.rope_write_kv(batch.qkv, batch.cache, **batch.meta)
    got = np.concatenate([batch.held("k", b) for b in range(2)])
    fmt, static = variant[0], batch.cache.static
    if fmt in ("cache_fp8", "block_wise_fp8"):
        # Half of an eighth, relative; half of the smallest step near zero.
        s = np.abs(k).max(-1, keepdims=True) / 448
        s = s if static is None else static.k_dequant[:, None]
        allowed = np.abs(k) / 16 + s * 2.0**-10
    else:
        allowed = 0.5 / static.k_quant.reshape(2, -1)
    # dequant is within 1 % of 1/quant; |q - zp| dequant <= ~3
    slack = 0.0 if static is None else 0.011 * (np.abs(k) + allowed)
    assert (np.abs(got - k) <= 1.001 * allowed + slack).all()
    assert not np.array_equal(got, k)
