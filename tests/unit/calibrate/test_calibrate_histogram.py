# SPDX-License-Identifier: Apache-2.0
"""The streamed sketch against NumPy on the stored values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkv.calibrate.histogram import Histogram


def stream(rng, n=3000):
    """Channels with outliers, an offset, tiny and huge values; later chunks widen the range."""
    x = rng.standard_normal((n, 6)) * [1, 5, 0.01, 1e4, 1e-9, 1]
    x[:, 1] += 90
    x[:, 5] = 5.3  # constant
    x *= np.linspace(0.1, 3, n)[:, None] ** 2
    x[:, 5] = 5.3
    x[n // 2, 0] = -77
    return x.astype(np.float32)


def fill(x, weights, bins, cuts):
    histogram = Histogram(x.shape[1], bins)
    for part, w in zip(np.split(x, cuts), np.split(weights, cuts), strict=True):
        if len(part):
            histogram.add(part, w)
    return histogram


def test_every_bin_holds_the_mass_of_its_interval():
    rng = np.random.default_rng()
    x = stream(rng)
    weights = rng.integers(0, 9, x.shape).astype(np.float64)  # sums are exact
    histogram = fill(x, weights, 64, [5, 700, 701, 2000])
    for channel in range(x.shape[1]):
        edges = histogram.start[channel] + histogram.width[channel] * np.arange(65)
        own = x[:, channel].astype(np.float64)
        want, _ = np.histogram(own, edges, weights=weights[:, channel])
        last = own == edges[-1]  # np.histogram closes its last bin; nothing may lie there
        assert not last.any()
        assert np.array_equal(histogram.mass[channel], want)
        assert histogram.mass[channel].sum() == weights[:, channel].sum()


def test_chunks_and_their_order_do_not_matter():
    rng = np.random.default_rng()
    x = stream(rng)
    ones = np.ones_like(x)
    whole = fill(x, ones, 128, [])
    order = rng.permutation(len(x))
    cuts = np.sort(rng.integers(0, len(x), 9))
    other = fill(x[order], ones, 128, cuts)
    assert np.array_equal(whole.width, other.width)
    assert np.array_equal(whole.start, other.start)
    assert np.array_equal(whole.mass, other.mass)


@given(st.integers(0, 2**32), st.sampled_from([16, 64, 512]))
def test_bins_are_as_narrow_as_stated(seed, bins):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((50, 3)) * 10.0 ** rng.integers(-6, 7, 3)).astype(np.float32)
    x += rng.choice([0, 1, -100], 3).astype(np.float32)
    histogram = fill(x, np.ones_like(x), bins, [10, 20])
    spread = (x.max(0).astype(np.float64) - x.min(0)) * 2 / (bins - 1)
    floor = np.abs(x).max(0).astype(np.float64) * 2.0**-21
    assert np.all(histogram.width <= np.maximum(spread, floor))


def test_a_quantile_is_off_by_less_than_a_bin():
    rng = np.random.default_rng()
    x = stream(rng)
    histogram = fill(x, np.ones_like(x), 256, [1000])
    for share in (0.001, 0.05, 0.5, 0.99, 0.999):
        exact = np.quantile(x.astype(np.float64), share, axis=0, method="inverted_cdf")
        below, above = exact - histogram.width, exact + histogram.width
        assert np.all(histogram.below(below) <= share * len(x))
        assert np.all(histogram.below(above) >= share * len(x))


def test_below_runs_from_nothing_to_everything():
    x = stream(np.random.default_rng())
    histogram = fill(x, np.ones_like(x), 32, [])
    low, high = x.min(0).astype(np.float64), x.max(0).astype(np.float64)
    assert np.array_equal(histogram.below(low - 3 * histogram.width), np.zeros(6))
    assert np.array_equal(histogram.below(high + 3 * histogram.width), np.full(6, len(x)))


@pytest.mark.parametrize("value", [0.0, 5.3, -1e-30, 3e38])
def test_a_constant_channel_is_one_bin(value):
    x = np.full((7, 1), value, np.float32)
    histogram = fill(x, np.ones_like(x), 16, [3])
    assert histogram.mass[0].max() == 7
    at = histogram.mass[0].argmax()
    edge = histogram.start[0] + at * histogram.width[0]
    assert edge <= x[0, 0] < edge + histogram.width[0]


def test_a_bins_mass_is_spread_evenly():
    x = stream(np.random.default_rng())
    histogram = fill(x, np.ones_like(x), 32, [])
    at = histogram.mass.argmax(axis=1)
    for share in (0.25, 0.5):
        before = np.array([m[:i].sum() for m, i in zip(histogram.mass, at, strict=True)])
        found = histogram.below(histogram.start + (at + share) * histogram.width)
        np.testing.assert_allclose(found, before + share * histogram.mass.max(axis=1))
