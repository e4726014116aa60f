# SPDX-License-Identifier: Apache-2.0
"""Calibration: multipliers and zero points from observed ranges, checked by a round trip."""

import numpy as np
import pytest

from fastkv import CacheSpec, StaticScales
from fastkv.arrays import numpy_dtype
from fastkv.errors import DtypeError, ScaleError, UnknownNameError, UnsupportedError
from fastkv.scales import FIELDS
from helpers import oracle
from helpers.compare import EPS

HEADS, DIM, TOKENS = 3, 8, 400
BOUNDS = {"cache_int8": 127, "cache_fp8": 448}


def spec(fmt):
    return CacheSpec(1, HEADS, DIM, 4, fmt)


def spread(rng, low, high):
    """Tokens `[n, Hkv, D]` in a range per channel, both ends among them, shuffled."""
    share = rng.uniform(0, 1, (TOKENS, HEADS, DIM))
    share[:2] = [[[0]], [[1]]]
    x = (np.float64(low) + share * (np.float64(high) - low)).astype(np.float32)
    return rng.permuted(np.clip(x, low, high), axis=0)


def round_trip(fmt, x, scales, side):
    field = {name: getattr(scales, f"{side}_{name}") for name in ("quant", "dequant", "zp")}
    stored, _ = oracle.quantize(fmt, x, quant=field["quant"], zp=field["zp"])
    read = oracle.dequantize(fmt, stored, dequant=field["dequant"], zp=field["zp"])
    return stored, read


# Symmetric formats


@pytest.mark.parametrize("fmt", BOUNDS)
@pytest.mark.parametrize("shape", [(HEADS,), (HEADS, DIM)])
def test_from_amax_is_bound_over_amax(fmt, shape):
    rng = np.random.default_rng(1)
    amax = {side: rng.uniform(0.01, 50, shape).astype(np.float32) for side in "kv"}
    scales = StaticScales.from_amax(amax["k"], amax["v"], fmt)
    for side in "kv":
        quant, dequant = getattr(scales, f"{side}_quant"), getattr(scales, f"{side}_dequant")
        assert quant.dtype == dequant.dtype == np.float32
        exact = amax[side].astype(np.float64)
        if fmt == "cache_fp8" and len(shape) == 2:  # it has no scales per channel
            exact = exact.max(axis=1)
        assert quant.shape == dequant.shape == exact.shape
        np.testing.assert_allclose(quant, BOUNDS[fmt] / exact, rtol=EPS)
        np.testing.assert_allclose(dequant, exact / BOUNDS[fmt], rtol=EPS)
    assert scales.k_zp is None
    assert scales.v_zp is None
    assert scales.validate(spec(fmt)) == ()


@pytest.mark.parametrize("fmt", BOUNDS)
def test_values_up_to_amax_come_back_within_half_a_step(fmt):
    rng = np.random.default_rng(2)
    amax = rng.uniform(0.1, 30, (HEADS,)).astype(np.float32)
    x = spread(rng, -amax[:, None].repeat(DIM, 1), amax[:, None].repeat(DIM, 1))
    scales = StaticScales.from_amax(amax, amax, fmt)
    stored, read = round_trip(fmt, x, scales, "k")
    step = amax[:, None] / BOUNDS[fmt]
    if fmt == "cache_fp8":  # 3 bits of mantissa, and subnormals of 2**-9
        step = np.maximum(np.abs(x) / 8, step * 2.0**-9)
    assert (np.abs(read - x) <= step * (0.5 + 1e-3)).all()
    if fmt == "cache_int8":
        codes = stored.view(np.int8)
        assert (codes.min(axis=(0, 2)) == -127).all()
        assert (codes.max(axis=(0, 2)) == 127).all()


@pytest.mark.parametrize("fmt", BOUNDS)
def test_from_minmax_of_a_symmetric_format_takes_the_larger_magnitude_of_a_head(fmt):
    rng = np.random.default_rng(3)
    low = rng.uniform(-9, -1, (2, HEADS, DIM)).astype(np.float32)
    high = rng.uniform(-0.5, 9, (2, HEADS, DIM)).astype(np.float32)
    scales = StaticScales.from_minmax(low[0], high[0], low[1], high[1], fmt)
    for i, side in enumerate("kv"):
        amax = [max(np.abs(low[i, h]).max(), np.abs(high[i, h]).max()) for h in range(HEADS)]
        np.testing.assert_allclose(
            getattr(scales, f"{side}_dequant"), np.array(amax) / BOUNDS[fmt], rtol=2 * EPS
        )
    assert scales.validate(spec(fmt)) == ()


# Formats with zero points


def ranges(rng, kind):
    """Lows and highs `[Hkv, D]` of one kind, float32."""
    width = rng.uniform(0.5, 4, (HEADS, DIM))
    low = {
        "around zero": -width * rng.uniform(0.2, 0.8, (HEADS, DIM)),
        "positive": rng.uniform(4, 9, (HEADS, DIM)),
        "negative": rng.uniform(-9, -5, (HEADS, DIM)),
        "from zero": np.zeros((HEADS, DIM)),
        "to zero": -width,
        "far from zero": rng.choice([-200.0, 200.0], (HEADS, DIM)),
    }[kind]
    return low.astype(np.float32), (low + width).astype(np.float32)


KINDS = ("around zero", "positive", "negative", "from zero", "to zero", "far from zero")


@pytest.mark.parametrize("kind", KINDS)
def test_values_in_range_come_back_within_half_a_step(kind):
    rng = np.random.default_rng(4)
    k, v = ranges(rng, kind), ranges(rng, "around zero")
    scales = StaticScales.from_minmax(*k, *v, "cache_int4_zp")
    for side, (low, high) in (("k", k), ("v", v)):
        x = spread(rng, low, high)
        stored, read = round_trip("cache_int4_zp", x, scales, side)
        step = (high.astype(np.float64) - low) / 15
        # x * quant + zp loses digits where x is many steps from 0.
        slack = 4 * EPS * (np.abs(x) / step + 16)
        assert (np.abs(read - x) <= step * (0.5 + slack)).all()
        nibbles = np.stack([stored & 15, stored >> 4], -1).reshape(TOKENS, HEADS, DIM)
        codes = (nibbles.astype(int) ^ 8) - 8
        assert (codes.min(axis=0) == -8).all(), "the smallest value has the smallest code"
        assert (codes.max(axis=0) == 7).all(), "the largest value has the largest code"
        np.testing.assert_allclose(getattr(scales, f"{side}_dequant"), step, rtol=1e-4)
        # A float: rounded, it would give away up to half a code at one end.
        np.testing.assert_allclose(getattr(scales, f"{side}_zp"), -8 - low / step, rtol=1e-4)
    assert scales.validate(spec("cache_int4_zp")) == ()


@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_zero_points_leave_the_codes_where_the_range_leaves_zero(kind):
    rng = np.random.default_rng(5)
    scales = StaticScales.from_minmax(
        *ranges(rng, kind), *ranges(rng, "around zero"), "cache_int4_zp"
    )
    assert (np.abs(scales.k_zp) > 8).all()
    assert (np.abs(scales.v_zp) < 8).all()
    assert (np.sign(scales.k_zp) == (-1 if kind == "positive" else 1)).all()


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.75, -3.0, 1000.0, -1e20])
def test_channel_that_never_moves_comes_back(value):
    constant = np.full((HEADS, DIM), value, np.float32)
    other = np.linspace(1, 2, HEADS * DIM, dtype=np.float32).reshape(HEADS, DIM)
    scales = StaticScales.from_minmax(constant, constant, -other, other, "cache_int4_zp")
    assert scales.validate(spec("cache_int4_zp")) == ()
    x = constant[None]
    _, read = round_trip("cache_int4_zp", x, scales, "k")
    step = np.maximum(2.0**-10 * np.abs(x), 2.0**-14) / 15  # as small as float32 allows
    assert (np.abs(read - x) <= 0.51 * step).all()
    # Within these bounds x * quant + zp keeps at least 10 bits below a code.
    assert (np.abs(scales.k_zp) <= 1.001 * (15 * 2**10 + 8)).all()


@pytest.mark.parametrize("fmt", BOUNDS)
def test_head_that_was_always_zero_gets_usable_multipliers(fmt):
    amax = np.array([0.0, 1e-38, 3.0], np.float32)
    scales = StaticScales.from_amax(amax, amax, fmt)
    assert scales.validate(spec(fmt)) == ()
    x = np.zeros((1, HEADS, DIM), np.float32)
    assert not round_trip(fmt, x, scales, "k")[1].any()


# What comes in


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_observed_values_may_be_half_precision(dtype):
    rng = np.random.default_rng(6)
    amax = rng.uniform(1, 5, (HEADS,)).astype(numpy_dtype(dtype))
    got = StaticScales.from_amax(amax, amax, "cache_fp8")
    want = StaticScales.from_amax(*2 * [oracle.values_of(amax).astype(np.float32)], "cache_fp8")
    for name in FIELDS[:4]:
        assert getattr(got, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_multipliers_are_arrays_of_their_own():
    amax = np.full(HEADS, 127, np.float32)
    scales = StaticScales.from_amax(amax, amax, "cache_int8")
    amax[:] = 5
    assert (scales.k_quant == 1).all()
    assert (scales.k_dequant == 1).all()


@pytest.mark.parametrize("fmt", ["none", "block_wise_fp8", "cache_int4_zp"])
def test_from_amax_refuses_formats_that_it_cannot_serve(fmt):
    amax = np.ones(HEADS, np.float32)
    with pytest.raises(UnsupportedError) as caught:
        StaticScales.from_amax(amax, amax, fmt)
    assert (caught.value.argument, caught.value.format) == ("quant", fmt)
    assert caught.value.op == "StaticScales.from_amax"
    assert ("from_minmax" in caught.value.hint) == (fmt == "cache_int4_zp")


@pytest.mark.parametrize("fmt", ["none", "block_wise_fp8"])
def test_from_minmax_refuses_formats_without_static_scales(fmt):
    ones = np.ones((HEADS, DIM), np.float32)
    with pytest.raises(UnsupportedError) as caught:
        StaticScales.from_minmax(-ones, ones, -ones, ones, fmt)
    assert (caught.value.op, caught.value.format) == ("StaticScales.from_minmax", fmt)


def test_unknown_format():
    ones = np.ones(HEADS, np.float32)
    with pytest.raises(UnknownNameError, match=r"StaticScales.from_amax: quant"):
        StaticScales.from_amax(ones, ones, "int7")


@pytest.mark.parametrize("fmt", BOUNDS)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.25])
def test_impossible_maxima_are_refused(fmt, side, value):
    amax = [np.ones(HEADS, np.float32), np.ones(HEADS, np.float32)]
    amax[side][1] = value
    with pytest.raises(ScaleError, match=r"first at \[1\]"):
        StaticScales.from_amax(*amax, fmt)


@pytest.mark.parametrize("fmt", ["cache_int8", "cache_fp8", "cache_int4_zp"])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "beyond"])
def test_impossible_ranges_are_refused(fmt, which, value):
    given = [sign * np.ones((HEADS, DIM), np.float32) for sign in (-1, 1, -1, 1)]
    given[which][2, 5] = (2 if which % 2 == 0 else -2) if value == "beyond" else value
    with pytest.raises(ScaleError, match=r"first at \[2, 5\]"):
        StaticScales.from_minmax(*given, fmt)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(DtypeError):
        StaticScales.from_amax([1.0, 2.0], [1.0, 2.0], "cache_fp8")
