# SPDX-License-Identifier: Apache-2.0
"""`calibrate` against formulas written out here."""

import numpy as np
import pytest

from fastkv import CacheSpec
from fastkv.errors import ScaleError, ShapeError, UnsupportedError
from fastkv.quant import QUANT_SPECS
from fastkv.scales.calibration import calibrate

N, HEADS, DIM = 50, 3, 8
STATIC = [row for row in QUANT_SPECS.values() if row.needs_static]
SYMMETRIC = [(row, layout) for row in STATIC if not row.needs_zp for layout in row.granularities]
WITH_ZP = [row for row in STATIC if row.needs_zp]


@pytest.fixture
def kv():
    """K with channels that stay away from 0, V around it; no two ranges alike."""
    rng = np.random.default_rng(8)
    k = rng.standard_normal((N, HEADS, DIM)) * rng.uniform(0.5, 4, (HEADS, DIM))
    k += rng.uniform(-9, 9, (HEADS, DIM))
    v = rng.standard_normal((N, HEADS, DIM)) * rng.uniform(0.1, 2, (HEADS, DIM))
    v[:, 0, 0] += 40  # one channel far from 0
    return k.astype(np.float32), v.astype(np.float32)


@pytest.mark.parametrize(("row", "layout"), SYMMETRIC, ids=lambda x: getattr(x, "name", x))
@pytest.mark.parametrize("headroom", [1.0, 1.25])
def test_symmetric_scales_map_the_widened_maximum_on_the_bound(kv, row, layout, headroom):
    scales = calibrate(*kv, row.name, granularity=layout, headroom=headroom)
    axes = (0, 2) if layout == "head" else (0,)
    for side, x in zip("kv", kv, strict=True):
        amax = np.abs(x.astype(np.float64)).max(axis=axes) * headroom
        np.testing.assert_allclose(getattr(scales, f"{side}_dequant"), amax / row.bound, rtol=1e-6)
        np.testing.assert_allclose(getattr(scales, f"{side}_quant"), row.bound / amax, rtol=1e-6)
    assert scales.validate(CacheSpec(1, HEADS, DIM, 16, row.name)) == ()


@pytest.mark.parametrize("row", STATIC, ids=lambda row: row.name)
def test_without_a_granularity_it_is_the_formats_preferred_one(kv, row):
    default, named = (calibrate(*kv, row.name, granularity=g) for g in (None, row.granularities[0]))
    assert np.array_equal(default.k_dequant, named.k_dequant)
    assert default.k_dequant.ndim == (1 if row.granularities[0] == "head" else 2)


@pytest.mark.parametrize("row", WITH_ZP, ids=lambda row: row.name)
@pytest.mark.parametrize("headroom", [1.0, 1.5])
def test_zero_points_keep_ks_own_range_and_make_a_zero_in_v_exact(kv, row, headroom):
    k, v = (x.astype(np.float64) for x in kv)
    scales = calibrate(*kv, row.name, headroom=headroom)
    levels = row.code_max - row.code_min
    low, high = k.min(0), k.max(0)
    middle, half = (low + high) / 2, (high - low) / 2 * headroom
    np.testing.assert_allclose(scales.k_dequant, 2 * half / levels, rtol=1e-5)
    lowest = (row.code_min - scales.k_zp.astype(np.float64)) * scales.k_dequant
    np.testing.assert_allclose(lowest, middle - half, rtol=1e-4, atol=1e-5)
    assert np.any(scales.k_zp != np.rint(scales.k_zp))

    low, high = np.minimum(v.min(0), 0), np.maximum(v.max(0), 0)
    np.testing.assert_allclose(scales.v_dequant, (high - low) * headroom / levels, rtol=1e-5)
    assert np.array_equal(scales.v_zp, np.rint(scales.v_zp))
    code = np.clip(np.rint(scales.v_zp), row.code_min, row.code_max)  # what 0 is stored as
    assert np.array_equal(code, scales.v_zp)
    ends = [(code - scales.v_zp) * scales.v_dequant for code in (row.code_min, row.code_max)]
    slack = scales.v_dequant * 0.51  # an integer zero point moves the range by half a step
    if headroom == 1:
        assert np.all(np.abs(ends[0] - low) <= slack)
        assert np.all(np.abs(ends[1] - high) <= slack)
    assert scales.validate(CacheSpec(1, HEADS, DIM, 16, row.name)) == ()


def test_half_precision_is_taken(kv):
    k, v = (x.astype(np.float16) for x in kv)
    same = calibrate(k.astype(np.float32), v.astype(np.float32), "cache_int8")
    assert np.array_equal(calibrate(k, v, "cache_int8").v_quant, same.v_quant)


@pytest.mark.parametrize("name", [n for n, row in QUANT_SPECS.items() if not row.needs_static])
def test_a_format_without_static_scales_is_refused(kv, name):
    with pytest.raises(UnsupportedError, match=f"calibrate: quant .*got {name}"):
        calibrate(*kv, name)


def test_what_cannot_be_used_is_refused_by_name(kv):
    k, v = kv
    with pytest.raises(ScaleError, match=r"granularity \(format cache_fp8\): expected head"):
        calibrate(k, v, "cache_fp8", granularity="channel")
    for headroom in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ScaleError, match="headroom"):
            calibrate(k, v, "cache_int8", headroom=headroom)
    with pytest.raises(ShapeError, match=r"calibrate: v .*got \[3, 8\]"):
        calibrate(k, v[0], "cache_int8")
    with pytest.raises(ShapeError, match=r"calibrate: k .*got \[0, 3, 8\]"):
        calibrate(k[:0], v, "cache_int8")
    v[4, 1, 2] = np.nan
    with pytest.raises(ScaleError, match=r"calibrate: v .*finite"):
        calibrate(k, v, "cache_int4_zp")
