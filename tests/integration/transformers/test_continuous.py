# SPDX-License-Identifier: Apache-2.0
"""generate_batch over fastkv's pages. Its hooks are not public: tox pins a version with them."""

import logging

import pytest
import torch
from transformers import (
    Gemma2Config,
    GenerationConfig,
    GptOssConfig,
    GraniteConfig,
    MistralConfig,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import cache as cb_cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastkv.errors import MissingTensorError, UnknownNameError, UnsupportedError
from fastkv.integrations.transformers import PagedCache, calibrate, continuous_batching
from fastkv.quant import QUANT_SPECS
from helpers.tiny_models import SHAPE, prompts, tiny

NEW = 24


def requests():
    return [prompts((n,), seed=n)["input_ids"][0].tolist() for n in (3, 40, 17, 64, 90, 64)]


def batched(model, inputs, **config):
    """New tokens of each request; room for 3 requests and 64 tokens at once, so that they mix."""
    limits = {"num_blocks": 40, "max_batch_tokens": 64, "max_requests_per_batch": 3, **config}
    greedy = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0, bos_token_id=1
    )
    found = model.generate_batch(
        inputs,
        generation_config=greedy,
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, auto_switch_to_flash=False, **limits
        ),
    )
    assert [result.error for result in found.values()] == [None] * len(inputs)
    return [result.generated_tokens for result in found.values()]


def alone(model, inputs, cache):
    found = []
    for prompt in inputs:
        given = {"past_key_values": cache()} if cache else {}
        ids = torch.tensor([prompt])
        got = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **given
        )
        found.append(got[0, ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("form", QUANT_SPECS)
def test_each_request_gets_the_tokens_that_it_gets_alone(form):
    model, inputs = tiny(), requests()
    seen = PagedCache()
    with torch.no_grad():
        model(torch.tensor([[*inputs[1], *inputs[3], *inputs[4]]]), past_key_values=seen)
    scales = calibrate(seen, form) if QUANT_SPECS[form].needs_static else None
    if form == "none":
        want = alone(tiny(attention="sdpa"), inputs, None)
    else:
        want = alone(model, inputs, lambda: PagedCache(form, scales=scales, page_size=16))
    with continuous_batching(model, form, scales=scales):
        got = batched(model, inputs)
    assert got == want
    assert model.config._attn_implementation == "fastkv"


OPTIONS = {
    "scale": GraniteConfig(**SHAPE, attention_multiplier=0.9),
    "soft cap": Gemma2Config(
        **SHAPE,
        head_dim=16,
        layer_types=["full_attention"] * 3,
        attn_logit_softcapping=1.0,
        query_pre_attn_scalar=1,
        tie_word_embeddings=False,  # tied, this model repeats its last token
    ),
    "sinks": GptOssConfig(
        **SHAPE, head_dim=16, layer_types=["full_attention"] * 3, num_local_experts=4
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_models_attention_arrive(monkeypatch, name):
    model, inputs = tiny(OPTIONS[name]), requests()[:3]
    for layer in model.model.layers:
        if name == "sinks":
            layer.self_attn.sinks.data.fill_(4.0)
    # A model with sinks says that it lacks sdpa, the name that is taken over here.
    monkeypatch.setattr(type(model), "_supports_sdpa", True)
    want = alone(model, inputs, lambda: PagedCache(page_size=16))
    with continuous_batching(model):
        assert batched(model, inputs) == want


def test_blocks_hold_what_the_format_needs():
    sizes = {}
    for form in ("none", "block_wise_fp8"):
        model = tiny()
        with continuous_batching(model, form):
            make = cb_cache.ATTN_TYPE_TO_ALLOCATOR["full_attention"]
            made = make(0, model.config, 2, torch.float32, 16, [0, 1, 2], True)
        sizes[form] = made.bytes_per_block
    # K and V: 16 tokens, 2 heads, D 16, 3 layers; float32 scales of each token and head.
    assert sizes == {"none": 2 * 3 * 16 * 2 * 16 * 4, "block_wise_fp8": 2 * 3 * (512 + 256)}


def test_everything_is_put_back():
    table, original = dict(cb_cache.ATTN_TYPE_TO_ALLOCATOR), ALL_ATTENTION_FUNCTIONS["sdpa"]
    model = tiny(attention="eager")

    def fail_within():
        with continuous_batching(model):
            assert model.config._attn_implementation == "sdpa"
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not original
            raise KeyError("of the caller's")

    with pytest.raises(KeyError):
        fail_within()
    assert dict(cb_cache.ATTN_TYPE_TO_ALLOCATOR) == table
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original
    assert model.config._attn_implementation == "eager"


def test_other_models_keep_their_attention_within_the_block():
    inputs, other = prompts((9, 4)), tiny(attention="sdpa", seed=5)
    with torch.no_grad():
        want = other(**inputs).logits
        with continuous_batching(tiny()):
            assert torch.equal(other(**inputs).logits, want)


def test_what_is_refused_before_anything_is_replaced():
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    sliding = tiny(MistralConfig(**SHAPE, sliding_window=8))
    for kind, model, options, argument in (
        (UnknownNameError, tiny(), {"format": "fp8"}, "format"),
        (MissingTensorError, tiny(), {"format": "cache_int8"}, "scales"),
        (UnsupportedError, sliding, {}, "model"),
    ):
        with pytest.raises(kind) as caught, continuous_batching(model, **options):
            pass
        assert caught.value.argument == argument
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original


def test_a_transformers_without_the_places_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(cb_cache, "ATTN_TYPE_TO_ALLOCATOR")
    with pytest.raises(UnsupportedError) as caught, continuous_batching(tiny()):
        pass
    assert caught.value.argument == "transformers"
    assert "ATTN_TYPE_TO_ALLOCATOR" in str(caught.value)


def test_another_attention_within_the_block_fails_by_name(caplog):
    model = tiny()
    with caplog.at_level(logging.ERROR), continuous_batching(model):
        model.set_attn_implementation("eager")
        with pytest.raises(AssertionError):
            batched(model, requests()[:1])
    assert "continuous_batching: attn_implementation: expected 'sdpa'" in caplog.text
