# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M: the model's own tokens over a cache of format `none`; KLs within fastkv eval's."""

import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from fastkv.eval.bounds import BOUNDS, CALIBRATION, PERPLEXITY_TOLERANCE
from fastkv.eval.gguf_llama import ModelFile, find_model
from fastkv.eval.gguf_tokenizer import TextTokenizer
from fastkv.eval.score import Score
from fastkv.eval.text import Span, read_text
from fastkv.integrations.transformers import PagedCache
from fastkv.quant import QUANT_SPECS
from fastkv.scales.calibration import calibrate
from helpers.smollm2 import model_of

PAGE = Path(__file__).resolve().parents[3] / "docs" / "transformers.md"
SPAN = Span(0, 256)
NEW = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a land far away, there lived a",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics say that energy",
)


@pytest.fixture(scope="module")
def file():
    return ModelFile(find_model(None)[0])


@pytest.fixture(scope="module")
def tokenizer(file):
    return TextTokenizer(file)


@pytest.fixture(scope="module")
def ids(tokenizer):
    """The tokens of the text as far as they are needed."""
    found = tokenizer.encode(read_text(None)[0][:92_000], "the text")
    assert len(found) > CALIBRATION.stop + 100
    return torch.from_numpy(found)[None]


@pytest.fixture(scope="module")
def model(file):
    return model_of(file.llama())


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer.encode(prompt, "the prompt").tolist() for prompt in PROMPTS]


def generate(model, prompts):
    """What each prompt goes on with over a PagedCache, and what it would by the model's own."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    model.set_attn_implementation("fastkv")
    cache = PagedCache(page_size=16)
    got = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False
    )
    return got[:, longest:].tolist(), own_choices(model, got, mask, longest)


def own_choices(model, tokens, mask, start):
    """The most likely token behind each prefix, by sdpa, in one forward and without a cache."""
    model.set_attn_implementation("sdpa")
    mask = torch.cat([mask, mask.new_ones(len(mask), NEW)], dim=1)[:, :-1]
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(
            tokens[:, :-1], attention_mask=mask, position_ids=at, use_cache=False,
            logits_to_keep=NEW,
        ).logits  # fmt: skip
    return logits.argmax(-1).tolist()


def test_a_padded_batch_of_four_gives_the_models_own_tokens(model, prompts):
    assert len({len(prompt) for prompt in prompts}) == 4
    got, own = generate(model, prompts)
    assert [len(tokens) for tokens in got] == [NEW] * 4
    assert got == own


@pytest.mark.parametrize("which", range(3))
def test_a_prompt_alone_gives_the_models_own_tokens(model, prompts, which):
    got, own = generate(model, [prompts[which]])
    assert got == own


@pytest.fixture(scope="module")
def seen(model, ids):
    """K and V of the calibration text in each layer, `[n, Hkv, D]`, by the own attention."""
    model.set_attn_implementation("sdpa")
    cache = DynamicCache()
    with torch.no_grad():
        model.model(ids[:, CALIBRATION.slice], past_key_values=cache)
    return [[x[0].transpose(0, 1) for x in (layer.keys, layer.values)] for layer in cache.layers]


def scales_of(seen, form):
    if not QUANT_SPECS[form].needs_static:
        return None
    return {i: calibrate(k, v, form) for i, (k, v) in enumerate(seen)}


@pytest.fixture(scope="module")
def exact(model, ids):
    """Logits of the scored text by the model's own attention."""
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(ids[:, SPAN.slice], use_cache=False).logits[0].numpy()


def score(model, ids, exact, cache):
    model.set_attn_implementation("fastkv")
    ids = ids[:, SPAN.slice]
    with torch.no_grad():
        parts = [
            model(part, past_key_values=cache).logits[0] for part in ids.split([100, 1, 89, 66], 1)
        ]
    found = Score()
    found.add(exact, torch.cat(parts).numpy(), ids[0, 1:].numpy())
    return found


def documented(form):
    """KL and top-1 of docs/transformers.md."""
    (row,) = re.findall(rf"^\| `{form}` \|(.*)\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    kl, bound, top1 = (float(cell) for cell in row.split("|"))
    assert bound == BOUNDS[SPAN].max_kl[form]
    return kl, top1


@pytest.mark.parametrize("form", QUANT_SPECS)
def test_a_format_is_within_the_bound_of_fastkv_eval(model, ids, seen, exact, form):
    found = score(model, ids, exact, PagedCache(form, scales=scales_of(seen, form)))
    bound = BOUNDS[SPAN].max_kl[form]
    print(f"| `{form}` | {found.mean_kl:.5f} | {bound} | {100 * found.top1:.1f} |")
    # Here `none` is held against another attention, whose sums have another order.
    assert found.mean_kl <= (bound or 1e-9)
    kl, top1 = documented(form)
    assert found.mean_kl == pytest.approx(kl, rel=0.15, abs=1e-5)
    assert 100 * found.top1 == pytest.approx(top1, abs=2)
    if form == "none":
        want = BOUNDS[SPAN].perplexity
        assert found.perplexity == pytest.approx(want, rel=PERPLEXITY_TOLERANCE)


def test_scales_of_the_layer_before_miss_the_bound(model, ids, seen, exact):
    scales = scales_of(seen, "cache_int8")
    wrong = {i: scales[(i - 1) % len(scales)] for i in scales}
    found = score(model, ids, exact, PagedCache("cache_int8", scales=wrong))
    assert found.mean_kl > 2 * BOUNDS[SPAN].max_kl["cache_int8"]
