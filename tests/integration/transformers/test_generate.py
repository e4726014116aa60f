# SPDX-License-Identifier: Apache-2.0
"""generate() over a PagedCache gives the tokens that the model's own attention gives."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    MistralConfig,
    PhimoeConfig,
    Qwen3Config,
)

from fastkv.integrations.transformers import PagedCache
from helpers.tiny_models import SHAPE, poison, positions, prompts, tiny

LENGTHS = (20, 15, 9, 1)
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 7},
}


def generated(model, inputs, cache, **options):
    torch.manual_seed(3)
    given = {} if cache is None else {"past_key_values": cache}
    return model.generate(**inputs, **given, max_new_tokens=40, **options)


@pytest.mark.parametrize(
    ("way", "page_size"), [*((way, 4) for way in WAYS), ("greedy", 64), ("beams", 16)]
)
def test_a_padded_batch_gives_the_tokens_of_the_models_own_attention(way, page_size):
    inputs = prompts(LENGTHS)
    want = generated(tiny(attention="sdpa"), inputs, None, **WAYS[way])
    cache = PagedCache(page_size=page_size)
    got = generated(tiny(), inputs, cache, **WAYS[way])
    assert got.tolist() == want.tolist()
    assert cache.length == want.shape[1] - 1
    assert len(set(want[:, 20:].flatten().tolist())) > 20


def test_the_tokens_depend_on_what_was_cached():
    inputs = prompts(LENGTHS)
    want = generated(tiny(), inputs, PagedCache(), do_sample=False)
    inputs["input_ids"][:, -3] = 5
    assert not (generated(tiny(), inputs, PagedCache(), do_sample=False) == want).all(-1).any()


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_requests_that_begin_and_end_at_page_boundaries(length):
    inputs = prompts((length, 1))
    want = generated(tiny(attention="sdpa"), inputs, None, do_sample=False)
    assert torch.equal(generated(tiny(), inputs, PagedCache(), do_sample=False), want)


def test_an_assistant_whose_guesses_are_taken_back():
    prompt = {"input_ids": prompts((20,))["input_ids"]}
    want = generated(tiny(attention="sdpa"), prompt, None, do_sample=False)
    model, assistant = tiny(), tiny(attention="sdpa", seed=9)
    cache = PagedCache(page_size=4)
    got = generated(model, prompt, cache, do_sample=False, assistant_model=assistant)
    assert torch.equal(got, want)


FAMILIES = {
    "sliding window": (MistralConfig, {"sliding_window": 8}),
    "window of the mask alone": (PhimoeConfig, {"sliding_window": 8, "num_local_experts": 4}),
    "norm of q and k": (Qwen3Config, {"head_dim": 32}),
    "soft cap": (Gemma2Config, {"head_dim": 16, "sliding_window": 8}),
    "sinks": (GptOssConfig, {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4}),
}


def family(name, attention, **changes):
    config, more = FAMILIES[name]
    model = tiny(config(**{**SHAPE, **more, **changes}), attention=attention)
    for parameter, value in model.named_parameters():
        if "sinks" in parameter:
            value.data.normal_(generator=torch.Generator().manual_seed(0))
    return model


def run(model, inputs, cache=None):
    return torch.stack(
        generated(
            model, inputs, cache, do_sample=False, return_dict_in_generate=True, output_logits=True
        ).logits
    )


@pytest.mark.filterwarnings("ignore:.*RoPE scaling factor")
@pytest.mark.parametrize("name", FAMILIES)
def test_what_other_models_ask_of_attention(name):
    inputs = prompts(LENGTHS)
    want = run(family(name, "eager"), inputs)
    got = run(family(name, "fastkv"), inputs, PagedCache(page_size=4))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_window_and_the_cap_are_more_than_nothing():
    inputs = prompts(LENGTHS)
    for name, change in (
        ("sliding window", {"sliding_window": 9}),
        ("soft cap", {"attn_logit_softcapping": 10.0}),
    ):
        other = run(family(name, "fastkv", **change), inputs, PagedCache())
        assert (other - run(family(name, "eager"), inputs)).abs().max() > 1e-2


def test_a_model_without_grouped_heads_and_rotation():
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 97, "initializer_range": 0.3}
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    inputs = prompts(LENGTHS)
    want = run(tiny(GPT2Config(**shape, **ends), attention="eager"), inputs)
    got = run(tiny(GPT2Config(**shape, **ends)), inputs, PagedCache())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    inputs = prompts(LENGTHS)
    with torch.no_grad():
        want = tiny(attention="eager")(**inputs).logits[:, -1]
        cache = PagedCache()
        got = tiny().to(dtype)(**inputs, past_key_values=cache).logits[:, -1]
    assert cache.keys_values(0)[0].shape == (4, 2, 20, 16)
    assert cache.spec.dtype == str(dtype).removeprefix("torch.")
    error = (got.float() - want).abs().max() / want.abs().max()
    assert error < (0.1 if dtype is torch.bfloat16 else 0.02)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_of_a_forward(side):
    inputs = prompts(LENGTHS)
    if side == "right":
        inputs = {name: x.flip(-1) for name, x in inputs.items()}
    own = tiny(attention="eager")
    with torch.no_grad():
        got = tiny()(
            **inputs,
            position_ids=positions(inputs["attention_mask"], 20),
            past_key_values=PagedCache(page_size=4),
        ).logits
        for b, length in enumerate(LENGTHS):
            alone = inputs["input_ids"][b][inputs["attention_mask"][b].bool()]
            want = own(alone[None]).logits[0]
            kept = slice(20 - length, None) if side == "left" else slice(length)
            torch.testing.assert_close(got[b, kept], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["none", "block_wise_fp8"])
def test_what_lies_where_no_token_is_does_not_matter(form):
    model, inputs = tiny(), prompts(LENGTHS)
    outs = []
    with torch.no_grad():
        for poisoned in (False, True):
            cache, mask, ids = (
                PagedCache(form, page_size=4),
                inputs["attention_mask"],
                inputs["input_ids"],
            )
            for _ in range(12):
                at = positions(mask, ids.shape[1])
                out = model(ids, attention_mask=mask, position_ids=at, past_key_values=cache)
                ids = out.logits[:, -1:].argmax(-1)
                mask = torch.cat([mask, mask.new_ones(4, 1)], dim=1)
                if poisoned:
                    poison(cache)
            outs.append(out.logits[:, -1])
    assert torch.equal(*outs)
    assert outs[0].isfinite().all()


def test_a_cache_grows_and_may_be_reserved():
    model, ids = tiny(), prompts((300,))["input_ids"]
    with torch.no_grad():
        want = tiny(attention="sdpa")(ids).logits[:, -1]
    sizes = []
    with torch.no_grad():
        for reserve in (0, 8, 400):
            cache = PagedCache(page_size=16, reserve=reserve)
            for part in ids.split([3, 7, 150, 140], dim=1):
                logits = model(part, past_key_values=cache).logits[:, -1]
                sizes.append(cache._storage.layer(2, 0).k.shape[0])
            torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    assert sizes == [17, 17, 17, 33, 1, 1, 17, 33, 25, 25, 25, 25]
