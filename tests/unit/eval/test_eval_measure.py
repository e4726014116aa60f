# SPDX-License-Identifier: Apache-2.0
"""The table over a tiny random Llama, and what counts as a missed bound."""

from dataclasses import replace

import numpy as np
import pytest

from fastkv.calibrate.methods import Recipe
from fastkv.eval.bounds import BOUNDS, bounds_for, missed
from fastkv.eval.measure import Evaluation, Row, Table
from fastkv.eval.serve import NumpyModel
from fastkv.eval.settings import Settings
from fastkv.eval.text import Span
from fastkv.quant import QUANT_SPECS, Granularity
from helpers import plain_llama

FORMATS = tuple(QUANT_SPECS.values())
SETTINGS = Settings(FORMATS, Span(0, 120), Span(150, 300), chunk=50)


@pytest.fixture(scope="module")
def model():
    return NumpyModel(plain_llama.random_llama(np.random.default_rng(11)))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(12).integers(0, 97, 400)


def by_format(scales):
    """What was calibrated, where each format is calibrated in one way."""
    return {cache.quant: found for cache, found in scales.items()}


def perplexity(logits, targets):
    logits = logits - logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.exp(-log_p[np.arange(len(targets)), targets].mean())


@pytest.fixture(scope="module")
def measured(model, ids):
    steps = []
    evaluation = Evaluation(model, ids, SETTINGS)
    return evaluation, evaluation.run(steps.append), steps


def test_float32_perplexity_is_the_plain_decoders(model, ids, measured):
    want = perplexity(plain_llama.logits(model.llama, ids[:120])[:-1], ids[1:120])
    assert measured[1].perplexity == pytest.approx(want, rel=1e-5)


def test_formats_rank_as_their_steps_do(measured):
    rows = {row.format: row for row in measured[1].rows}
    assert list(rows) == [quant.name.value for quant in FORMATS]
    assert rows["none"].kl == 0
    assert rows["none"].top1 == 1
    assert rows["none"].perplexity == measured[1].perplexity
    assert 0 < rows["cache_int8"].kl < rows["cache_fp8"].kl < rows["cache_int4_zp"].kl
    assert 0 < rows["block_wise_fp8"].kl < rows["cache_int4_zp"].kl
    assert all(0 < row.top1 < 1 for row in rows.values() if row.kl > 1e-3)
    assert all(row.tokens_per_s > 0 for row in rows.values())


def test_bytes_are_counted_from_the_definitions(measured):
    values = 2 * 3 * 2 * 16  # K and V, layers, heads, D
    rows = {row.format: (row.bytes_per_token, row.fixed_bytes) for row in measured[1].rows}
    assert rows["none"] == (4 * values, 0)
    assert rows["cache_int8"] == (values, 4 * 2 * 2 * 3 * 2)  # float32, a pair, K and V
    assert rows["cache_int4_zp"] == (values // 2, 4 * 3 * 2 * 3 * 2 * 16)
    assert rows["block_wise_fp8"] == (values + 4 * 2 * 3 * 2, 0)


def test_every_step_is_announced(measured):
    evaluation, _, steps = measured
    assert len(steps) == evaluation.steps
    assert steps.count("calibrate") == 3
    assert steps.count("cache_int8") == 3
    assert steps.count("float32") == 3
    assert "none" not in steps  # the float32 cache is run once


def test_scales_come_from_the_calibration_tokens_alone(model, ids):
    settings = replace(SETTINGS, formats=(QUANT_SPECS["cache_int8"],))
    (scales,) = Evaluation(model, ids, settings).calibrated().values()
    elsewhere = ids.copy()
    elsewhere[:150], elsewhere[300:] = 5, 6
    (same,) = Evaluation(model, elsewhere, settings).calibrated().values()
    other = replace(settings, calibrate=Span(200, 350))
    (different,) = Evaluation(model, ids, other).calibrated().values()
    assert sorted(scales) == [0, 1, 2]
    for layer, bundle in scales.items():
        assert np.array_equal(bundle.k_dequant, same[layer].k_dequant)
        assert not np.array_equal(bundle.v_dequant, different[layer].v_dequant)
    firsts = [bundle.k_dequant[0] for bundle in scales.values()]
    assert len(set(firsts)) == 3


def test_granularity_and_headroom_reach_the_formats_that_have_them(model, ids):
    formats = (QUANT_SPECS["cache_int8"], QUANT_SPECS["cache_fp8"])
    settings = replace(SETTINGS, formats=formats, granularities=(Granularity.CHANNEL,))
    by_channel = by_format(Evaluation(model, ids, settings).calibrated())
    assert by_channel[formats[0]][1].k_dequant.shape == (2, 16)
    assert by_channel[formats[1]][1].k_dequant.shape == (2,)
    doubled = replace(settings, recipes=(Recipe(headroom=2.0),))
    wide = by_format(Evaluation(model, ids, doubled).calibrated())
    for quant in formats:
        doubled = 2 * by_channel[quant][1].k_dequant
        np.testing.assert_allclose(wide[quant][1].k_dequant, doubled, rtol=1e-6)


def test_none_may_store_another_dtype_than_the_float32_cache_it_is_compared_with(model, ids):
    settings = replace(SETTINGS, formats=(QUANT_SPECS["none"],), dtype="bfloat16")
    evaluation = Evaluation(model, ids, settings)
    table = evaluation.run()
    assert evaluation.steps == 6
    assert table.rows[0].dtype == "bfloat16"
    assert 0 < table.rows[0].kl < 0.05
    assert table.rows[0].bytes_per_token == 2 * 2 * 3 * 2 * 16
    assert table.perplexity != table.rows[0].perplexity


def test_a_bos_token_begins_every_sequence(model, ids):
    settings = replace(SETTINGS, formats=(QUANT_SPECS["none"],))
    table = Evaluation(model, ids, settings, bos=42).run()
    sequence = np.concatenate([[42], ids[:120]])
    want = perplexity(plain_llama.logits(model.llama, sequence)[:-1], sequence[1:])
    assert table.perplexity == pytest.approx(want, rel=1e-5)


def test_dropped_scales_are_seen(model, ids):
    quant = QUANT_SPECS["cache_int8"]
    evaluation = Evaluation(model, ids, replace(SETTINGS, formats=(quant,)))
    ((cache, scales),) = evaluation.calibrated().items()
    swapped = {i: replace(s, k_quant=s.v_quant, k_dequant=s.v_dequant) for i, s in scales.items()}
    dropped = {i: replace(s, v_dequant=np.ones_like(s.v_dequant)) for i, s in scales.items()}
    good, clipped, unscaled = (
        evaluation.scored({cache: s}).rows[0].kl for s in (scales, swapped, dropped)
    )
    assert good * 5 < clipped
    assert good * 50 < unscaled


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_each_layer_reads_its_own_scales(model, ids, layer):
    quant = QUANT_SPECS["cache_fp8"]
    evaluation = Evaluation(model, ids, replace(SETTINGS, formats=(quant,)))
    ((cache, scales),) = evaluation.calibrated().items()
    wrong = replace(scales[layer], v_dequant=3 * scales[layer].v_dequant)
    good, bad = (
        evaluation.scored({cache: s}).rows[0].kl for s in (scales, {**scales, layer: wrong})
    )
    assert bad > 5 * good


def test_fixed_bytes_follow_the_granularity(model, ids):
    formats = (QUANT_SPECS["cache_int8"],)
    settings = replace(SETTINGS, formats=formats, granularities=(Granularity.CHANNEL,))
    (row,) = Evaluation(model, ids, settings).run().rows
    assert row.granularity == "channel"
    assert row.fixed_bytes == 4 * 2 * 2 * 3 * 2 * 16  # float32, a pair, K and V, layers, heads, D


# Bounds

DOCUMENTED = Settings(FORMATS, Span(0, 3072), Span(20_000, 22_048))


def row(name, kl):
    return Row(name, "x", None, kl, 21.0, 1.0, 1, 0, 1.0)


def test_bounds_hold_for_the_documented_settings_only():
    assert bounds_for(DOCUMENTED) is BOUNDS[Span(0, 3072)]
    assert bounds_for(replace(DOCUMENTED, score=Span(0, 256))) is BOUNDS[Span(0, 256)]
    assert bounds_for(replace(DOCUMENTED, granularities=(Granularity.HEAD,))) is not None
    for change in (
        {"score": Span(0, 300)},
        {"calibrate": Span(0, 2048)},
        {"backend": "flash"},
        {"dtype": "bfloat16"},
        {"recipes": (Recipe(headroom=1.1),)},
        {"recipes": (Recipe("mse"),)},
        {"recipes": (Recipe(), Recipe("mse"))},
        {"prefill": 8},
        {"granularities": (Granularity.CHANNEL,)},
    ):
        assert bounds_for(replace(DOCUMENTED, **change)) is None, change


@pytest.mark.parametrize("name", BOUNDS[Span(0, 3072)].max_kl)
def test_a_kl_above_its_bound_or_nan_misses(name):
    bounds = BOUNDS[Span(0, 3072)]
    bound = bounds.max_kl[name]
    assert missed(Table(21.067, (row(name, bound),)), bounds) == []
    for kl in (bound + 1e-9, float("nan")):
        (text,) = missed(Table(21.067, (row(name, kl),)), bounds)
        assert text.startswith(f"{name}: KL ")


@pytest.mark.parametrize("perplexity", [21.04, 21.1, float("nan")])
def test_another_perplexity_over_float32_misses(perplexity):
    bounds = BOUNDS[Span(0, 3072)]
    (text,) = missed(Table(perplexity, (row("cache_int8", 0.001),)), bounds)
    assert "perplexity over float32" in text
    assert missed(Table(21.0669, (row("a format to come", 9.0),)), bounds) == []


def test_the_bounds_are_those_of_the_documentation():
    assert dict(BOUNDS[Span(0, 3072)].max_kl) == {
        "none": 0.0,
        "cache_int8": 0.0025,
        "cache_fp8": 0.011,
        "cache_int4_zp": 0.11,
        "block_wise_fp8": 0.0055,
    }
