# SPDX-License-Identifier: Apache-2.0
import json
import os

import pytest

from fastkv import CacheSpec, errors
from fastkv.engine_config import ModelConfig, parse_config, read_config, spec_from_config
from fastkv.quant import Granularity, QuantType

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}


def llama(*without, **changes):
    return {key: value for key, value in {**LLAMA, **changes}.items() if key not in without}


def quantized(**keys):
    return llama(quantization_config=keys)


def fastdeploy(name, **keys):
    return quantized(quantization="mix_quant", kv_cache_quant_type=name, **keys)


def scheme(**keys):
    values = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, **keys}
    return quantized(quant_method="compressed-tensors", kv_cache_scheme=values)


# Shapes


def test_the_shape_of_a_plain_config():
    got = parse_config(LLAMA)
    assert (got.num_layers, got.num_kv_heads, got.head_dim) == (32, 8, 128)
    assert (got.dtype, got.quant, got.notes) == ("bfloat16", QuantType.NONE, ())
    assert got.windows == (None,) * 32
    assert got.spec(16) == CacheSpec(32, 8, 128, 16, "none", "bfloat16")


def test_the_smallest_model():
    got = parse_config(llama(num_hidden_layers=1, num_key_value_heads=1, head_dim=1))
    assert (got.num_layers, got.num_kv_heads, got.head_dim) == (1, 1, 1)


def test_head_dim_wins_over_the_quotient():
    assert parse_config(llama(head_dim=256)).head_dim == 256
    assert parse_config(llama(head_dim=None)).head_dim == 128


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float16", "torch.float16", "fp16"])
def test_the_dtype_by_either_key(key, value):
    got = parse_config({**llama("torch_dtype"), key: value})
    assert (got.dtype, got.notes) == ("float16", ())


def test_dtype_is_the_newer_key():
    assert parse_config(llama(dtype="float32")).dtype == "float32"


def test_what_is_assumed_is_noted():
    got = parse_config(llama("torch_dtype", "num_key_value_heads"))
    assert (got.num_kv_heads, got.dtype) == (32, "bfloat16")
    assert [note.split(":")[0] for note in got.notes] == ["No num_key_value_heads", "No dtype"]


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_a_multimodal_config_nests_the_language_model(key):
    vision = {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024}
    text = llama("torch_dtype")
    got = parse_config({"vision_config": vision, key: text, "torch_dtype": "float16"})
    assert (got.num_layers, got.num_kv_heads, got.head_dim, got.dtype) == (32, 8, 128, "float16")
    assert got.notes == ()


def test_a_nested_language_model_wins_over_the_top_level():
    assert parse_config(llama(text_config=llama(num_hidden_layers=7))).num_layers == 7


def test_a_nested_stub_without_a_shape_is_passed_over():
    assert parse_config(llama(text_config={"model_type": "llama"})).num_layers == 32


def test_a_dtype_of_the_language_model_wins():
    config = {"text_config": llama(), "torch_dtype": "float32"}
    assert parse_config(config).dtype == "bfloat16"


# Layers of several kinds


def test_layers_without_a_cache_are_not_counted_and_noted():
    kinds = [*["linear_attention"] * 3, "full_attention"] * 8
    got = parse_config(llama(layer_types=kinds, full_attention_interval=4))
    assert (got.num_layers, got.windows) == (8, (None,) * 8)
    assert got.notes == (
        "24 of 32 layers (linear_attention) keep no K and V; their state is not counted.",
    )
    assert spec_from_config(llama(layer_types=kinds)).num_tensors == 16


def test_sliding_and_chunked_layers_keep_their_windows():
    kinds = ["sliding_attention", "chunked_attention", "full_attention", "attention"]
    got = parse_config(
        llama(
            num_hidden_layers=4, layer_types=kinds, sliding_window=1024, attention_chunk_size=8192
        )
    )
    assert got.windows == (1024, 8192, None, None)


def test_minimax_and_jamba_name_their_layers_otherwise():
    got = parse_config(llama(num_hidden_layers=3, attn_type_list=[0, 1, 0]))
    assert got.num_layers == 1
    kinds = ["mamba", "attention", "mamba"]
    got = parse_config(llama(num_hidden_layers=3, layers_block_type=kinds, attn_layer_period=3))
    assert got.num_layers == 1


@pytest.mark.parametrize(
    ("keys", "noted"),
    [
        ({"sliding_window": 4096}, True),
        ({"sliding_window": 4096, "use_sliding_window": True}, True),
        ({"sliding_window": 4096, "use_sliding_window": False}, False),
        ({"sliding_window": None}, False),
    ],
)
def test_a_window_without_layer_types_is_noted_and_counted_in_full(keys, noted):
    got = parse_config(llama(**keys))
    assert got.windows == (None,) * 32
    assert any("sliding_window" in note for note in got.notes) == noted


def test_keys_of_other_caches_that_are_off_are_harmless():
    off = {key: type(value)() for key, value in {**OTHER_CACHES, **OTHER_PATTERNS}.items()}
    assert parse_config(llama(**off, v_head_dim=128)) == parse_config(LLAMA)
    assert parse_config(llama(**dict.fromkeys(off))) == parse_config(LLAMA)


def test_every_kind_without_a_cache():
    kinds = ["linear_attention", "mamba", "conv", "full_attention"]
    got = parse_config(llama(num_hidden_layers=4, layer_types=kinds))
    assert got.num_layers == 1
    assert "3 of 4 layers (linear_attention, mamba, conv)" in got.notes[0]


def test_draft_layers_are_noted():
    assert "num_nextn_predict_layers" in parse_config(llama(num_nextn_predict_layers=1)).notes[0]


# The format


@pytest.mark.parametrize(
    ("name", "quant", "granularity"),
    [
        ("int8", "cache_int8", Granularity.CHANNEL),
        ("float8_e4m3fn", "cache_fp8", Granularity.HEAD),
        ("int4_zp", "cache_int4_zp", Granularity.CHANNEL),
        ("block_wise_fp8", "block_wise_fp8", None),
    ],
)
def test_fastdeploys_names(name, quant, granularity):
    config = fastdeploy(name, is_channel_wise=False, has_zero_point=False)
    got = parse_config(config)
    assert (got.quant, got.granularity) == (QuantType(quant), granularity)
    assert spec_from_config(config) == CacheSpec(32, 8, 128, 64, quant, "bfloat16", "float32")


def test_int4_may_say_that_it_has_zero_points():
    assert parse_config(fastdeploy("int4_zp", has_zero_point=True)).quant == "cache_int4_zp"


@pytest.mark.parametrize(
    ("keys", "quant"),
    [
        ({}, "cache_fp8"),
        ({"strategy": "attn_head"}, "cache_fp8"),
        ({"strategy": None, "symmetric": None, "dynamic": False}, "cache_fp8"),
        ({"type": "int"}, "cache_int8"),
    ],
)
def test_compressed_tensors_schemes(keys, quant):
    got = parse_config(scheme(**keys))
    assert (got.quant, got.granularity) == (QuantType(quant), Granularity.HEAD)


@pytest.mark.parametrize(
    "keys",
    [
        {"quantization": "block_wise_fp8"},  # of the weights
        {"quantization": "mix_quant", "kv_cache_quant_type": None},
        {"quant_method": "compressed-tensors", "kv_cache_scheme": None},
        {"quant_method": "quark", "kv_cache_post_rope": False},
    ],
)
def test_quantized_weights_leave_the_cache_alone(keys):
    assert parse_config(quantized(**keys)).quant is QuantType.NONE


def test_two_kv_cache_quantizations_are_told_apart():
    with pytest.raises(errors.SpecError) as caught:
        parse_config(fastdeploy("int8", kv_cache_scheme={"num_bits": 8, "type": "int"}))
    assert caught.value.expected == "nothing beside kv_cache_quant_type"


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_the_quantization_may_lie_in_the_language_model(key):
    text = llama(**{key: {"kv_cache_quant_type": "int8"}})
    assert parse_config({"text_config": text}).quant == "cache_int8"
    assert parse_config(text).quant == "cache_int8"


# Paths


def test_the_file_its_folder_and_the_parsed_config_say_the_same(tmp_path):
    config = fastdeploy("float8_e4m3fn")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    want = CacheSpec(32, 8, 128, 32, "cache_fp8", "bfloat16", "float16")
    for given in (config, file, str(tmp_path)):
        assert spec_from_config(given, 32, scale_dtype="float16") == want


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"[" * 200_000, b'{"num_hidden_layers": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "not utf-8", "too deep", "too long a number"],
)
def test_a_file_that_is_not_json_is_named(tmp_path, content):
    file = tmp_path / "odd.json"
    file.write_bytes(content)
    with pytest.raises(errors.SpecError) as caught:
        read_config(file)
    assert (caught.value.op, caught.value.argument) == (str(file), "the file")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_config(tmp_path)


# What is refused: the error, and the key that it names

MISSING = [
    (llama("num_hidden_layers"), "num_hidden_layers"),
    (llama("num_key_value_heads", "num_attention_heads"), "num_key_value_heads"),
    (llama("hidden_size"), "head_dim"),
    (llama("num_attention_heads"), "num_attention_heads"),
    ({"text_config": llama("num_hidden_layers")}, "text_config.num_hidden_layers"),
    ({"text_config": {}}, "text_config.num_hidden_layers"),
    ({}, "num_hidden_layers"),
]
WRONG = [
    (llama(num_hidden_layers=value), "num_hidden_layers")
    for value in (0, -1, 32.0, "32", True, None, [32], 10**9)
] + [
    (llama(num_key_value_heads=[8, 4]), "num_key_value_heads"),
    (llama(num_key_value_heads=False), "num_key_value_heads"),
    (llama(head_dim=0), "head_dim"),
    (llama(hidden_size=4100), "hidden_size"),
    (llama(torch_dtype="float64"), "torch_dtype"),
    (llama(dtype=["bfloat16"]), "dtype"),
    (llama(layer_types=["full_attention"]), "layer_types"),
    (llama(layer_types="full_attention"), "layer_types"),
    (llama(layer_types=["sliding_attention"] * 32), "sliding_window"),
    (llama(layer_types=["chunked_attention"] * 32, sliding_window=8), "attention_chunk_size"),
    (llama(text_config=[1]), "text_config"),
    (llama(quantization_config="fp8"), "quantization_config"),
    (quantized(kv_cache_scheme="FP8"), "quantization_config.kv_cache_scheme"),
    (fastdeploy("int8", has_zero_point="no"), "quantization_config.has_zero_point"),
    (fastdeploy("float8_e4m3fn", is_channel_wise=1), "quantization_config.is_channel_wise"),
    (fastdeploy("int8", kv_cache_scheme={}), "quantization_config.kv_cache_scheme"),
]
OTHER_CACHES = {
    "kv_lora_rank": 512,
    "compress_ratios": [4, 128],
    "num_kv_shared_layers": 10,
    "global_head_dim": 512,
    "swa_head_dim": 192,
    "num_global_key_value_heads": 4,
    "swa_num_key_value_heads": 8,
    "block_configs": [{"attention": {"n_heads_in_group": 8}}],
    "cross_attention_layers": [3, 8],
    "is_encoder_decoder": True,
}
OTHER_PATTERNS = {
    "full_attention_interval": 4,
    "hybrid_override_pattern": "M*E",
    "attn_layer_period": 8,
    "attn_layer_indices": [9, 18],
    "full_attn_idxs": [2, 5],
    "linear_attn_config": {"full_attn_layers": [4]},
}
OTHER_KV_HEADS = (
    "num_kv_heads",
    "n_head_kv",
    "multi_query",
    "multi_query_group_num",
    "attn_config",
)
REFUSED = [
    *((llama(**{key: value}), key) for key, value in OTHER_CACHES.items()),
    *((llama(**{key: value}), key) for key, value in OTHER_PATTERNS.items()),
    *((llama("num_key_value_heads", **{key: 1}), key) for key in OTHER_KV_HEADS),
    ({"text_config": llama(kv_lora_rank=512)}, "text_config.kv_lora_rank"),
    (llama(head_dim=192, v_head_dim=128), "v_head_dim"),
    (llama(layer_types=["linear_attention"] * 32), "layer_types"),
    (llama(layer_types=["full_attention"] * 31 + ["hybrid"]), "layer_types[31]"),
    (llama(layer_types=["full_attention"] * 31 + [[]]), "layer_types[31]"),
    (llama(num_hidden_layers=2, attn_type_list=[1, 2]), "attn_type_list[1]"),
    (fastdeploy("int8_zp"), "quantization_config.kv_cache_quant_type"),
    (fastdeploy("float8_e4m3fn_zp"), "quantization_config.kv_cache_quant_type"),
    (fastdeploy("int8", has_zero_point=True), "quantization_config.has_zero_point"),
    (fastdeploy("block_wise_fp8", has_zero_point=True), "quantization_config.has_zero_point"),
    (fastdeploy("float8_e4m3fn", is_channel_wise=True), "quantization_config.is_channel_wise"),
    (quantized(kv_cache_quant_config={"x": 1}), "quantization_config.kv_cache_quant_config"),
    (quantized(kv_cache_scheme={}), "quantization_config.kv_cache_scheme"),
    (scheme(num_bits=4), "quantization_config.kv_cache_scheme"),
    (scheme(type=["float"]), "quantization_config.kv_cache_scheme"),
    (scheme(strategy="channel"), "quantization_config.kv_cache_scheme.strategy"),
    (scheme(symmetric=False), "quantization_config.kv_cache_scheme.symmetric"),
    (scheme(dynamic=True), "quantization_config.kv_cache_scheme.dynamic"),
]
CASES = [
    *((config, key, errors.SpecError, "nothing") for config, key in MISSING),
    *((config, key, errors.SpecError, None) for config, key in WRONG),
    *((config, key, errors.UnsupportedError, None) for config, key in REFUSED),
    *((value, "the file", errors.SpecError, None) for value in ([], "text", None, 3)),
]


@pytest.mark.parametrize(
    ("config", "key", "kind", "got"), CASES, ids=[f"{i}-{case[1]}" for i, case in enumerate(CASES)]
)
def test_a_config_that_cannot_be_counted_is_refused_by_file_and_key(config, key, kind, got):
    with pytest.raises(kind) as caught:
        parse_config(config, "models/x/config.json")
    assert type(caught.value) is kind
    assert (caught.value.op, caught.value.argument) == ("models/x/config.json", key)
    assert got is None or caught.value.got == got
    assert str(caught.value).startswith(f"models/x/config.json: {key}")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("int9", "Did you mean 'int8'?"),
        ("float8", "Did you mean 'float8_e4m3fn'?"),
        ("", ""),
        (7.5, ""),
        (["int8"], "Did you mean 'int8'?"),
    ],
)
def test_an_unknown_format_lists_the_known_ones(name, hint):
    with pytest.raises(errors.UnknownNameError) as caught:
        parse_config(fastdeploy(name), "c.json")
    assert caught.value.argument == "quantization_config.kv_cache_quant_type"
    assert caught.value.expected == "one of int8, float8_e4m3fn, int4_zp, block_wise_fp8"
    assert caught.value.hint == hint


def test_a_long_value_is_cut_in_the_error():
    with pytest.raises(errors.SpecError) as caught:
        parse_config(llama(num_hidden_layers="x" * 10**6))
    assert len(str(caught.value)) < 200


def test_the_caller_names_a_parsed_config():
    with pytest.raises(errors.SpecError, match=r"^of engine 3: num_hidden_layers: "):
        spec_from_config({}, source="of engine 3")
    with pytest.raises(errors.SpecError, match=r"^config: num_hidden_layers: "):
        spec_from_config({})
    with pytest.raises(errors.SpecError, match=r"^config: num_hidden_layers: "):
        parse_config({})


def test_the_most_layers():
    assert parse_config(llama(num_hidden_layers=10_000)).num_layers == 10_000
    with pytest.raises(errors.SpecError, match="1 to 10000"):
        parse_config(llama(num_hidden_layers=10_001))


def test_windows_of_another_number_of_layers_are_refused():
    with pytest.raises(errors.SpecError, match=r"^ModelConfig: windows: .* one a layer, got 2$"):
        ModelConfig(4, 2, 64, windows=(None, 8))


def test_reading_a_config_and_planning_need_no_array_library(run_python):
    code = (
        "import sys, fastkv.engine_config as c, fastkv.plan as p\n"
        f"p.plan(c.parse_config({LLAMA!r}), memory=p.Memory(2**36, 2**34))\n"
        "found = {'numpy', 'ml_dtypes', 'torch', 'paddle', 'cupy'} & set(sys.modules)\n"
        "assert not found, found"
    )
    run_python(code, **os.environ)
