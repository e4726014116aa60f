# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M: the model's own tokens over a cache of format `none`; KLs within fastkv eval's."""

import pytest
import torch

from fastkv.eval.bounds import BOUNDS, CALIBRATION, PERPLEXITY_TOLERANCE
from fastkv.eval.gguf_llama import ModelFile, find_model
from fastkv.eval.gguf_tokenizer import TextTokenizer
from fastkv.eval.score import Score
from fastkv.eval.source import Source
from fastkv.eval.text import Span
from fastkv.integrations.transformers import PagedCache, calibrate
from fastkv.quant import QUANT_SPECS
from helpers.smollm2 import model_of

SPAN = Span(0, 256)
NEW = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a land far away, there lived a",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics say that energy",
)


@pytest.fixture(scope="module")
def source():
    return Source.load(None, None, {"--score": SPAN, "--calibrate": CALIBRATION})


@pytest.fixture(scope="module")
def model(source):
    return model_of(source.model)


@pytest.fixture(scope="module")
def prompts():
    tokenizer = TextTokenizer(ModelFile(find_model(None)[0]))
    return [tokenizer.encode(prompt, "the prompt").tolist() for prompt in PROMPTS]


def generate(model, attention, prompts):
    longest = max(map(len, prompts))
    model.set_attn_implementation(attention)
    ids = torch.tensor([[2] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    cache = {"past_key_values": PagedCache(page_size=16)} if attention == "fastkv" else {}
    got = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **cache)
    return got[:, longest:].tolist()


@pytest.fixture(scope="module")
def own_tokens(model, prompts):
    return generate(model, "sdpa", prompts)


def test_a_padded_batch_of_four_gives_the_models_own_tokens(model, prompts, own_tokens):
    assert len({len(prompt) for prompt in prompts}) > 1
    got = generate(model, "fastkv", prompts)
    assert [len(tokens) for tokens in got] == [NEW] * 4
    assert got == own_tokens


@pytest.mark.parametrize("which", range(3))
def test_a_prompt_alone_gives_the_models_own_tokens(model, prompts, which):
    got = generate(model, "fastkv", [prompts[which]])
    assert got == generate(model, "sdpa", [prompts[which]])


@pytest.fixture(scope="module")
def seen(model, source):
    """K and V of the calibration text, in a cache of format `none`."""
    model.set_attn_implementation("fastkv")
    cache = PagedCache(reserve=len(CALIBRATION))
    with torch.no_grad():
        for part in torch.from_numpy(source.ids[CALIBRATION.slice])[None].split(512, dim=1):
            model.model(part, past_key_values=cache)
    return cache


@pytest.fixture(scope="module")
def exact(model, source):
    """Logits of the scored text by the model's own attention."""
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        ids = torch.from_numpy(source.ids[SPAN.slice])[None]
        return model(ids, use_cache=False).logits[0].numpy()


def score(model, source, exact, cache):
    model.set_attn_implementation("fastkv")
    ids = torch.from_numpy(source.ids[SPAN.slice])[None]
    with torch.no_grad():
        parts = [
            model(part, past_key_values=cache).logits[0] for part in ids.split([100, 1, 89, 66], 1)
        ]
    found = Score()
    found.add(exact, torch.cat(parts).numpy(), ids[0, 1:].numpy())
    return found


@pytest.mark.parametrize("form", QUANT_SPECS)
def test_a_format_is_within_the_bound_of_fastkv_eval(model, source, seen, exact, form):
    scales = calibrate(seen, form) if QUANT_SPECS[form].needs_static else None
    found = score(model, source, exact, PagedCache(form, scales=scales))
    bound = BOUNDS[SPAN].max_kl[form]
    print(f"{form}: KL {found.mean_kl:.5f}, top-1 {100 * found.top1:.1f} %")
    # Here `none` is held against another attention, whose sums have another order.
    assert found.mean_kl <= (bound or 1e-9)
    assert found.mean_kl > bound / 3 or form == "none"
    if form == "none":
        want = BOUNDS[SPAN].perplexity
        assert found.perplexity == pytest.approx(want, rel=PERPLEXITY_TOLERANCE)


def test_scales_of_the_layer_before_miss_the_bound(model, source, seen, exact):
    scales = calibrate(seen, "cache_int8")
    wrong = {i: scales[(i - 1) % len(scales)] for i in scales}
    found = score(model, source, exact, PagedCache("cache_int8", scales=wrong))
    assert found.mean_kl > 2 * BOUNDS[SPAN].max_kl["cache_int8"]
