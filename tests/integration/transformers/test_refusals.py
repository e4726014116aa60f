# SPDX-License-Identifier: Apache-2.0
"""Bad input: one error that names argument, expected and got, and a cache as it was."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DiffLlamaConfig,
    DynamicCache,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
)

from fastkv import StaticScales
from fastkv.errors import (
    ContractError,
    DtypeError,
    LayerIndexError,
    MissingTensorError,
    ShapeError,
    SpecError,
    SpecMismatchError,
    SurplusTensorError,
    UnknownNameError,
    UnsupportedError,
)
from fastkv.integrations.transformers import PagedCache, calibrate
from fastkv.integrations.transformers.attention import intervals
from helpers.tiny_models import SHAPE, prompts, tiny


def read(model, cache, **inputs):
    with torch.no_grad():
        ids = {"input_ids": prompts((9, 9))["input_ids"]}
        return model(**(inputs or ids), past_key_values=cache)


def refused(kind, call, argument, *words):
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert argument in error.argument
    for word in (*words, f"expected {error.expected}", f"got {error.got}"):
        assert word in str(error)
    return error


@pytest.fixture
def scales():
    cache = PagedCache()
    read(tiny(), cache)
    return calibrate(cache, "cache_int8")


# The cache


@pytest.mark.parametrize("name", ["fp8", "int4", "", None, 8, ["none", "fp8", "none"]])
def test_a_format_that_nobody_knows(name):
    refused(UnknownNameError, lambda: PagedCache(name), "format", "cache_int8")


@pytest.mark.parametrize("name", ["cache_int8", "cache_fp8", "cache_int4_zp", ["cache_int8"] * 3])
def test_a_static_format_without_scales(name):
    refused(MissingTensorError, lambda: PagedCache(name), "scales", "calibrate")


@pytest.mark.parametrize("name", ["none", "block_wise_fp8"])
def test_scales_for_a_format_that_has_none(name, scales):
    refused(SurplusTensorError, lambda: PagedCache(name, scales=scales), "scales", "3 layers")


def test_scales_of_too_few_or_too_many_layers(scales):
    few = PagedCache("cache_int8", scales={0: scales[0], 2: scales[2]})
    refused(MissingTensorError, lambda: read(tiny(), few), "scales[1]")
    many = PagedCache("cache_int8", scales={**scales, 3: scales[0]})
    refused(LayerIndexError, lambda: read(tiny(), many), "layer_id", "scales")
    assert few.length == many.length == 0
    assert few.spec is None


def test_scales_of_another_model(scales):
    model = tiny(LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}))
    cache = PagedCache("cache_int8", scales=scales)
    refused(ShapeError, lambda: read(model, cache), "static.k_quant", "[4]", "[2]")


def test_scales_that_no_op_can_use(scales):
    wrong = {**scales, 1: StaticScales(*[torch.zeros(2)] * 4)}
    cache = PagedCache("cache_int8", scales=wrong)
    error = refused(ContractError, lambda: read(tiny(), cache), "k_quant")
    assert "layer_id=1" in str(error)


def test_a_head_dim_that_the_format_cannot_pack(scales):
    config = GPT2Config(n_embd=60, n_layer=3, n_head=4, vocab_size=97)
    cache = PagedCache("cache_int4_zp", scales=scales)
    refused(SpecError, lambda: read(tiny(config), cache), "head_dim", "15", "cache_int4_zp")


@pytest.mark.parametrize("page_size", [0, -1, 1.5])
def test_a_page_size_that_cannot_be(page_size):
    refused(ContractError, lambda: PagedCache(page_size=page_size), "page_size")


def test_options_that_no_model_can_make_right():
    refused(ContractError, lambda: PagedCache("block_wise_fp8", scale_dtype="int8"), "scale_dtype")
    for reserve in (-1, "many", 1.5):
        refused(SpecError, lambda reserve=reserve: PagedCache(reserve=reserve), "reserve")
    for scales, argument in (([1, 2, 3], "scales"), ({0: 1}, "scales[0]")):
        refused(
            ContractError, lambda scales=scales: PagedCache("cache_int8", scales=scales), argument
        )


def test_calibration_from_an_empty_cache():
    refused(ContractError, lambda: calibrate(PagedCache(), "cache_int8"), "cache")


# Another model, another batch


OTHERS = {
    "more layers": ({"num_hidden_layers": 4}, SpecMismatchError, "model"),
    "more KV heads": ({"num_key_value_heads": 4}, ShapeError, "key_states"),
    "more query heads": ({"num_attention_heads": 8, "head_dim": 16}, ShapeError, "query"),
    "a larger head": ({"head_dim": 32}, ShapeError, "key_states"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_cache_that_another_model_filled(name):
    change, kind, argument = OTHERS[name]
    cache = PagedCache()
    read(tiny(), cache)
    before = cache.keys_values(0)
    refused(kind, lambda: read(tiny(LlamaConfig(**{**SHAPE, **change})), cache), argument)
    assert cache.length == 9
    assert all(map(torch.equal, cache.keys_values(0), before))


def test_another_dtype_and_another_batch():
    cache = PagedCache()
    read(tiny(), cache)
    refused(DtypeError, lambda: read(tiny().half(), cache), "key_states", "float16", "float32")
    one = prompts((3,))["input_ids"]
    refused(ShapeError, lambda: read(tiny(), cache, input_ids=one), "key_states", "[2, 2, 3, 16]")
    assert cache.length == 9


# Other attention


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_another_attention_over_a_paged_cache(name):
    cache = PagedCache()
    model = tiny(attention=name)
    refused(UnsupportedError, lambda: read(model, cache), "attn_implementation", "'fastkv'")
    assert cache.length == 0


@pytest.mark.parametrize("make", [lambda: None, DynamicCache])
def test_fastkv_over_another_cache_or_none(make):
    error = refused(UnsupportedError, lambda: read(tiny(), make()), "past_key_values", "PagedCache")
    assert "fastkv" in error.op


def test_a_model_whose_keys_are_not_what_it_caches():
    config = DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4}, kv_lora_rank=16, q_lora_rank=16, v_head_dim=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=32,
    )  # fmt: skip
    refused(UnsupportedError, lambda: read(tiny(config), PagedCache()), "attn_implementation")
    refused(UnsupportedError, lambda: PagedCache().prepare(tiny(config), 2), "kv_lora_rank", "16")


def test_prepare_refuses_what_the_first_attention_would():
    cases = (
        (tiny(attention="sdpa"), "attn_implementation"),
        (tiny().train(), "model"),
        (
            tiny(Gemma3TextConfig(**SHAPE, head_dim=16, use_bidirectional_attention=True)),
            "is_causal",
        ),
    )
    for model, argument in cases:
        cache = PagedCache()
        refused(UnsupportedError, lambda: cache.prepare(model, 2), argument)  # noqa: B023
        assert cache.spec is None


def test_a_model_that_attends_twice_to_the_keys_of_a_layer():
    # The second attention would write them behind the first one's, and see them twice.
    model = tiny(DiffLlamaConfig(**SHAPE))
    refused(UnsupportedError, lambda: read(model, PagedCache()), "model", "a second one")


def test_a_model_with_layers_that_keep_another_state():
    config = FalconH1Config(**SHAPE, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_state=8)
    cache = PagedCache()
    refused(UnsupportedError, lambda: read(tiny(config), cache), "model", "get_conv_state")
    assert cache.length == 0


# What fastkv does not compute


def test_a_chunked_layer():
    config = Llama4TextConfig(
        **SHAPE, head_dim=16, num_local_experts=2, attention_chunk_size=8, intermediate_size_mlp=64
    )
    cache = PagedCache()
    refused(UnsupportedError, lambda: read(tiny(config), cache), "layer_types", "chunked_attention")
    assert cache.length == 0


def test_attention_weights_are_not_given():
    cache, inputs = PagedCache(), prompts((9, 9))
    call = lambda: read(tiny(), cache, **inputs, output_attentions=True)  # noqa: E731
    refused(UnsupportedError, call, "output_attentions")
    assert cache.length == 0


def test_a_model_in_training():
    cache = PagedCache()
    refused(UnsupportedError, lambda: read(tiny().train(), cache), "model", "model.eval()")
    assert cache.length == 0


def test_tokens_that_see_the_future():
    config = Gemma3TextConfig(**SHAPE, head_dim=16, use_bidirectional_attention=True)
    cache = PagedCache()
    with pytest.raises(UnsupportedError) as caught:
        read(tiny(config), cache)
    assert caught.value.argument in ("attention_mask", "is_causal")
    assert cache.length == 0


def test_a_mask_of_four_axes():
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    call = lambda: read(tiny(), PagedCache(), **prompts((9, 9)) | {"attention_mask": mask})  # noqa: E731
    refused(UnsupportedError, call, "attention_mask", "[2, 1, 9, 9]")


def test_a_mask_of_another_length():
    mask = torch.ones(2, 8)
    call = lambda: read(tiny(), PagedCache(), **prompts((9, 9)) | {"attention_mask": mask})  # noqa: E731
    refused(ShapeError, call, "attention_mask", "[2, 9]", "[2, 8]")


@pytest.mark.parametrize("new", [1, 3])
def test_padding_between_the_tokens_of_a_request(new):
    cache, model = PagedCache(), tiny()
    read(model, cache)
    mask, ids = torch.ones(2, 9 + new), torch.ones(2, new, dtype=torch.long)
    mask[1, 6] = 0
    call = lambda: read(model, cache, input_ids=ids, attention_mask=mask)  # noqa: E731
    refused(UnsupportedError, call, "attention_mask", "request 1")
    assert cache.length == 9


def test_intervals_of_masks():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    got = intervals(batch_size=4, q_length=2, kv_length=4, attention_mask=mask)
    each = [[2, 4], [0, 4], [0, 1], [0, 0]]
    assert got.tolist() == [row for row in each for _ in range(2)]
    assert got.dtype == torch.int32
    assert intervals(batch_size=4, q_length=2, kv_length=4) is None
    for other in ({"use_vmap": True}, {"allow_is_causal_skip": False}):
        with pytest.raises(UnsupportedError):
            intervals(batch_size=4, q_length=2, kv_length=4, **other)


def test_intervals_of_a_window():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    got = intervals(batch_size=3, q_length=2, kv_length=4, attention_mask=mask, local_size=2)
    assert got.tolist() == [[2, 4], [2, 4], [1, 4], [2, 4], [1, 1], [1, 1]]
    assert got.dtype == torch.int32
    got = intervals(batch_size=1, q_length=2, kv_length=4, local_size=3, device="cpu")
    assert got.tolist() == [[0, 4], [1, 4]]
    assert intervals(batch_size=1, q_length=2, kv_length=4, local_size=4) is None


# Cropping and reordering


def test_what_cannot_be_cropped_or_reordered():
    cache = PagedCache()
    read(tiny(), cache)
    for tokens in (1, -10):
        refused(ContractError, lambda tokens=tokens: cache.crop(tokens), "tokens_to_remove")
    beams = torch.tensor([0, 1, 1])
    refused(ShapeError, lambda: cache.reorder_cache(beams), "beam_idx", "[2]", "[3]")
    for method in ("reset", "offload", "prefetch"):
        refused(UnsupportedError, getattr(cache.layers[1], method), "layer", "layer 1")
    refused(UnsupportedError, lambda: cache.layers[1].crop(-1), "layer")
    refused(UnsupportedError, lambda: cache.layers[1].reorder_cache(beams), "layer")
    refused(UnsupportedError, lambda: cache.early_initialization(2), "cache", "reserve")
    assert cache.length == 9
