# SPDX-License-Identifier: Apache-2.0
"""Methods and recipes: percentiles against NumPy's on the stored values."""

import numpy as np
import pytest

from fastkv.calibrate.histogram import Histogram
from fastkv.calibrate.methods import METHODS, Recipe, Side, recommended
from fastkv.errors import ContractError, UnknownNameError
from fastkv.quant import QUANT_SPECS, Granularity

INT8, INT4 = QUANT_SPECS["cache_int8"], QUANT_SPECS["cache_int4_zp"]


@pytest.fixture
def x():
    rng = np.random.default_rng()
    return (rng.standard_t(3, (5000, 2, 4)) * rng.uniform(0.5, 9, (2, 4)) + 1).astype(np.float32)


def observed(x, name="k", weights=None):
    histogram = Histogram(x[0].size)
    histogram.add(x.reshape(len(x), -1), np.ones((len(x), 1)) if weights is None else weights)
    return Side(name, x.min(0), x.max(0), histogram)


def widths(side):
    return side.histogram.width.reshape(side.low.shape)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_of_a_channel_is_numpys_within_a_bin(x, percentile):
    side = observed(x)
    recipe = Recipe("percentile", percentile=percentile)
    low, high = recipe.range(side, INT8, Granularity.CHANNEL)
    exact = np.quantile(np.abs(x), percentile / 100, axis=0, method="inverted_cdf")
    assert np.all(np.abs(high - exact) <= widths(side))
    assert np.array_equal(low, -high)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_of_a_head_pools_its_channels(x, percentile):
    side = observed(x)
    recipe = Recipe("percentile", percentile=percentile)
    _, high = recipe.range(side, INT8, Granularity.HEAD)
    for head in range(2):
        exact = np.quantile(np.abs(x[:, head]), percentile / 100, method="inverted_cdf")
        assert np.all(np.abs(high[head] - exact) <= widths(side)[head].max())
        assert len(set(high[head].tolist())) == 1


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_with_zero_points_either_end_loses_half_of_the_rest(x, percentile):
    side = observed(x)
    low, high = Recipe("percentile", percentile=percentile).range(side, INT4, Granularity.CHANNEL)
    rest = (1 - percentile / 100) / 2
    for found, share in ((low, rest), (high, 1 - rest)):
        exact = np.quantile(x, share, axis=0, method="inverted_cdf")
        assert np.all(np.abs(found - exact) <= widths(side))


def test_percentile_100_and_minmax_are_the_range(x):
    side = observed(x)
    for method in ("percentile", "minmax"):
        low, high = Recipe(method, percentile=100).range(side, INT4, Granularity.CHANNEL)
        np.testing.assert_allclose(low, x.min(0), atol=widths(side).max())
        assert np.all(np.abs(high - x.max(0)) <= widths(side))
    low, high = Recipe().range(side, INT8, Granularity.HEAD)
    assert np.array_equal(low, x.min(0))
    assert np.array_equal(high, x.max(0))


def test_a_percentile_weighs_tokens(x):
    x[0] = 1000
    weights = np.ones((len(x), 1))
    recipe = Recipe("percentile", percentile=99)
    _, light = recipe.range(observed(x, weights=weights), INT8, Granularity.CHANNEL)
    weights[0] = len(x)
    _, heavy = recipe.range(observed(x, weights=weights), INT8, Granularity.CHANNEL)
    assert np.all(light < 500)
    assert np.all(heavy > 990)


def test_only_k_takes_the_power(x):
    for name, same in (("k", False), ("v", True)):
        side = observed(x, name)
        square, fourth = (
            Recipe("mse", k_power=p).range(side, INT4, Granularity.CHANNEL) for p in (2, 6)
        )
        assert np.array_equal(square[1], fourth[1]) is same


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "minmx"}, "--method: expected one of minmax, percentile, mse"),
        ({"weights": "none"}, "--weights: expected one of uniform, attention"),
        ({"headroom": 0.0}, "--headroom: expected finite and > 0"),
        ({"headroom": float("nan")}, "--headroom"),
        ({"percentile": 50.0}, "--percentile: expected above 50, at most 100"),
        ({"percentile": 101.0}, "--percentile"),
        ({"k_power": 0}, "--k-power: expected 1 to 8"),
        ({"k_power": 9}, "--k-power"),
    ],
)
def test_a_recipe_that_is_none_is_refused(fields, says):
    with pytest.raises((ContractError, UnknownNameError)) as error:
        Recipe(**fields)
    assert says in str(error.value)


def test_every_static_format_has_a_recommendation():
    for row in QUANT_SPECS.values():
        for layout in row.granularities:
            assert recommended(row, layout).method in METHODS
    assert recommended(INT8, Granularity.CHANNEL).headroom > 1
    assert recommended(INT8, Granularity.HEAD).headroom == 1
    assert recommended(INT4, Granularity.CHANNEL).by_attention


def test_a_recipe_describes_itself():
    assert Recipe().describe() == "minmax, headroom 1"
    percentile = Recipe("percentile", headroom=1.25, percentile=99.99)
    assert percentile.describe() == "percentile 99.99, uniform weights, headroom 1.25"
    mse = Recipe("mse", weights="attention", k_power=3)
    assert mse.describe() == "mse, |error|^3 in K, attention weights, headroom 1"
