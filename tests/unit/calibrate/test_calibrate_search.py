# SPDX-License-Identifier: Apache-2.0
"""The search over a histogram against brute force over the stored values."""

import ml_dtypes
import numpy as np
import pytest

from fastkv.calibrate.histogram import Histogram
from fastkv.calibrate.search import CUTS, codes_of, search
from fastkv.quant import QUANT_SPECS, Granularity
from fastkv.scales.calibration import side_scales

STATIC = [row for row in QUANT_SPECS.values() if row.needs_static]
CASES = [(row, layout) for row in STATIC for layout in row.granularities]


def names(x):
    return str(getattr(x, "name", x))


def values(rng, n=4000, heads=2, dim=3):
    """Heavy tails: clipping pays. One channel far from 0."""
    x = rng.standard_t(3, (n, heads, dim)) * rng.uniform(0.2, 5, (heads, dim))
    x[:, 1, 2] += 30
    return x.astype(np.float32)


def sketch(x, weights=None, bins=2048):
    histogram = Histogram(x[0].size, bins)
    w = np.ones(len(x)) if weights is None else weights
    histogram.add(x.reshape(len(x), -1), w[:, None])
    return histogram


def code(u, row):
    """The format's nearest code, from a list of all, ties aside."""
    if row.storage == "float8_e4m3fn":
        return np.clip(u, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.clip(np.rint(u), row.code_min, row.code_max)


def error(x, within, side, row, layout, weights=None, power=2):
    """Mean |error|^p of each channel (or head), on the values themselves."""
    quant, dequant, zp = side_scales(side, within, row, layout)
    quant, dequant = (s if s.ndim == 2 else s[:, None] for s in (quant, dequant))
    zp = 0 if zp is None else zp
    x64 = x.astype(np.float64)
    back = (code(x64 * quant + zp, row) - zp) * dequant
    w = np.ones(len(x)) if weights is None else weights
    each = (w[:, None, None] * np.abs(back - x64) ** power).sum(0) / w.sum()
    return each.sum(-1, keepdims=True) if layout is Granularity.HEAD else each


@pytest.mark.parametrize(("row", "layout"), CASES, ids=names)
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("power", [2, 3])
def test_no_candidate_is_better_on_the_values_themselves(row, layout, side, power):
    rng = np.random.default_rng()
    x = values(rng)
    weights = rng.uniform(0, 1, len(x)) ** 4
    seen = x.min(0), x.max(0)
    found = search(side, sketch(x, weights, 16384), seen, row, layout, power)
    got = error(x, found, side, row, layout, weights, power)
    if row.needs_zp:
        start = seen if side == "k" else (np.minimum(seen[0], 0), np.maximum(seen[1], 0))
        span = start[1] - start[0]
        # Along either end from where the search stopped.
        others = [(start[0] + c * span, found[1]) for c in CUTS]
        others += [(found[0], start[1] - c * span) for c in CUTS]
    else:
        amax = np.maximum(np.abs(seen[0]), np.abs(seen[1]))
        if layout is Granularity.HEAD:
            amax = np.broadcast_to(amax.max(-1, keepdims=True), amax.shape)
        others = [(-amax * (1 - c), amax * (1 - c)) for c in CUTS]
    for low, high in [seen, *others]:
        within = low.astype(np.float32), np.maximum(high, low + 1e-3).astype(np.float32)
        # The few values of a tail lie anywhere in their bins: 5 % in 1 of 1,000 draws of a case.
        assert np.all(got <= error(x, within, side, row, layout, weights, power) * 1.2)


def test_heavy_tails_are_clipped_and_uniform_values_are_not():
    rng = np.random.default_rng()
    row = QUANT_SPECS["cache_int4_zp"]
    heavy = values(rng)
    seen = heavy.min(0), heavy.max(0)
    low, high = search("k", sketch(heavy), seen, row, Granularity.CHANNEL)
    assert np.all(high - low < 0.9 * (seen[1] - seen[0]))
    flat = rng.uniform(-3, 7, heavy.shape).astype(np.float32)
    seen = flat.min(0), flat.max(0)
    low, high = search("k", sketch(flat), seen, row, Granularity.CHANNEL)
    assert np.all(high - low > 0.9 * (seen[1] - seen[0]))


def test_a_heavy_token_keeps_its_place():
    rng = np.random.default_rng()
    row = QUANT_SPECS["cache_int4_zp"]
    x = rng.standard_normal((3000, 1, 2)).astype(np.float32)
    x[0] = 20
    seen = x.min(0), x.max(0)
    weights = np.ones(len(x))
    _, cut = search("k", sketch(x, weights), seen, row, Granularity.CHANNEL)
    weights[0] = 1e5
    _, kept = search("k", sketch(x, weights), seen, row, Granularity.CHANNEL)
    assert np.all(cut < 14)
    assert np.all(kept > 19)


def test_a_constant_channel_keeps_its_range():
    x = np.full((9, 1, 2), 5.5, np.float32)
    x[:, 0, 1] = 0
    seen = x.min(0), x.max(0)
    for row, layout in CASES:
        for side in "kv":
            low, high = search(side, sketch(x), seen, row, layout)
            quant, dequant, _ = side_scales(side, (low, high), row, layout)
            assert np.all(np.isfinite(quant) & (quant > 0) & np.isfinite(dequant))
            back = error(x, (low, high), side, row, layout)
            assert np.all(back <= 0.01 * 5.5**2), (row.name, side)


@pytest.mark.parametrize("row", STATIC, ids=names)
@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_integral_is_that_of_the_distance_to_the_nearest_code(row, power):
    rng = np.random.default_rng()
    codes = codes_of(row, power)
    top = row.code_max * 1.5
    a, b = np.sort(rng.uniform(-top, top, (2, 20)), axis=0)
    u = a + (b - a) * (np.arange(200_001)[:, None] + 0.5) / 200_001
    nearest = np.abs(u - code(u, row)) ** power
    np.testing.assert_allclose(
        codes.integral(b) - codes.integral(a), nearest.mean(0) * (b - a), rtol=1e-3
    )
