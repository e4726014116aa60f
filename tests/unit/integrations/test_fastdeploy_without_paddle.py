# SPDX-License-Identifier: Apache-2.0
"""What `fastkv.integrations.fastdeploy` is without Paddle: names, signatures, specs."""

import inspect
import json
import os

import pytest

from fastkv import CacheSpec
from fastkv.errors import MissingDependencyError, SpecError, UnknownNameError, UnsupportedError
from fastkv.integrations import fastdeploy

# The parameters of the engine's ops, develop branch of January 2026, in their order.
PLAN = """encoder_batch_ids encoder_tile_ids_per_batch encoder_num_blocks kv_batch_ids
kv_tile_ids_per_batch kv_num_blocks decoder_batch_ids decoder_tile_ids_per_batch
decoder_num_blocks"""
BEFORE = f"""qkv key_cache value_cache seq_lens_encoder seq_lens_decoder seq_lens_this_time
batch_id_per_token cu_seqlens_q block_tables {PLAN} set_max_lengths"""
AFTER = """rotary_embs attn_mask qkv_bias qkv_scale k_quant_scale v_quant_scale k_dequant_scale
v_dequant_scale cache_k_zp cache_v_zp linear_shift linear_smooth mask_offset kv_signal_data
q_norm_weight k_norm_weight sinks rms_norm_eps compute_type cache_quant_type use_neox_rotary_style
rope_3d max_input_length quant_max_bound quant_min_bound out_linear_in_scale encoder_block_shape_q
decoder_block_shape_q max_partition_size encoder_max_partition_size speculate_max_draft_token_num
causal speculate_decoder sliding_window"""
SIGNATURES = {
    "append_attention": f"{BEFORE} {AFTER} sink_size head_wise_full_hidden",
    "append_attention_with_output": f"{BEFORE} out {AFTER}",
    "gqa_rope_write_cache": """qkv key_cache value_cache cu_seqlens_q cu_seqlens_k rotary_embs
        seq_lens_this_time seq_lens_encoder seq_lens_decoder batch_id_per_token block_tables
        kv_batch_ids kv_tile_ids_per_batch kv_num_blocks cache_batch_ids cache_tile_ids_per_batch
        cache_num_blocks q_norm_weight k_norm_weight cache_k_quant_scales cache_v_quant_scales
        cache_k_dequant_scales cache_v_dequant_scales cache_k_zp cache_v_zp kv_signal_data
        kv_token_num max_seq_len rms_norm_eps use_neox_rotary_style cache_quant_type rope_3d""",
    "pre_cache_len_concat": """seq_lens_encoder seq_lens_decoder seq_lens_this_time max_dec_len
        block_size""",
    "get_block_shape_and_split_kv_block": """seq_lens_encoder seq_lens_decoder seq_lens_this_time
        decoder_batch_ids decoder_tile_ids_per_batch decoder_num_blocks_cpu
        decoder_num_blocks_device decoder_chunk_size_device max_len_tensor_cpu encoder_batch_ids
        encoder_tile_ids_per_batch encoder_num_blocks_x_cpu kv_batch_ids kv_tile_ids_per_batch
        kv_num_blocks_x_cpu encoder_block_shape_q decoder_block_shape_q group_size block_size""",
    "flash_mask_attention": """q k v cu_seqlens_q cu_seqlens_k seq_lens_encoder attn_out
        attn_mask_offsets num_heads kv_num_heads head_dim max_seq_len q_token_num kv_token_num""",
    "merge_prefill_decode_output": """encoder_res decoder_res seq_lens_encoder seq_lens_decoder
        seq_lens_this_time cu_seq_q head_num head_dim max_token""",
}


@pytest.mark.parametrize("op", SIGNATURES)
def test_the_signature_is_the_engines(op):
    parameters = inspect.signature(getattr(fastdeploy, op)).parameters
    assert list(parameters) == SIGNATURES[op].split()
    kinds = {parameter.kind for parameter in parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_importing_it_imports_no_array_library(run_python):
    code = (
        "import sys, fastkv.integrations.fastdeploy as f\n"
        "assert all(getattr(f, name) for name in f.__all__)\n"
        "found = {'numpy', 'ml_dtypes', 'torch', 'paddle', 'cupy'} & set(sys.modules)\n"
        "assert not found, found"
    )
    run_python(code, **os.environ)


def test_without_paddle_the_error_is_the_line_that_installs_it(run_python):
    code = (
        "import sys\n"
        "sys.modules['paddle'] = None\n"
        "from fastkv.integrations.fastdeploy.tensors import load_paddle\n"
        "from fastkv.errors import MissingDependencyError\n"
        "try:\n"
        "    load_paddle()\n"
        "except MissingDependencyError as error:\n"
        "    print(error.install)\n"
    )
    assert run_python(code, **os.environ).stdout == "pip install 'fastkv[paddle]'\n"
    assert issubclass(MissingDependencyError, ImportError)


# spec_from_config


def config(**quantization):
    """A model's config, with the engine's way to ask for a quantized cache."""
    shape = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
    shape |= {"head_dim": 128, "torch_dtype": "bfloat16"}
    return shape | ({"quantization_config": quantization} if quantization else {})


def asks(value):
    return config(
        quantization="mix_quant",
        kv_cache_quant_type=value,
        is_channel_wise=False,
        has_zero_point=False,
    )


@pytest.mark.parametrize(
    ("value", "fmt"),
    [
        ("int8", "cache_int8"),
        ("float8_e4m3fn", "cache_fp8"),
        ("int4_zp", "cache_int4_zp"),
        ("block_wise_fp8", "block_wise_fp8"),
    ],
)
def test_the_engines_value_names_the_format(value, fmt, tmp_path):
    want = CacheSpec(3, 4, 128, 64, fmt, "bfloat16", "bfloat16")
    assert fastdeploy.spec_from_config(asks(value)) == want
    (tmp_path / "config.json").write_text(json.dumps(asks(value)))
    assert fastdeploy.spec_from_config(tmp_path) == want


def test_without_quantization_the_cache_has_the_models_dtype():
    for given in (config(), config(quantization="wint8")):
        assert fastdeploy.spec_from_config(given) == CacheSpec(3, 4, 128, 64, scale_dtype="bf16")


def test_page_size_ranks_and_scale_dtype():
    found = fastdeploy.spec_from_config(
        asks("block_wise_fp8"), 32, tp_rank=1, tp_size=2, scale_dtype="float32"
    )
    assert found == CacheSpec(3, 2, 128, 32, "block_wise_fp8", "bfloat16", "float32")
    with pytest.raises(SpecError, match="tp_rank"):
        fastdeploy.spec_from_config(asks("int8"), tp_rank=1)


@pytest.mark.parametrize("value", ["int8_zp", "float8_e4m3fn_zp"])
def test_what_the_engine_does_not_implement_is_refused_by_name(value):
    with pytest.raises(UnsupportedError) as caught:
        fastdeploy.spec_from_config(asks(value))
    assert caught.value.argument == "quantization_config.kv_cache_quant_type"
    assert value in caught.value.got


def test_a_misspelt_value_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="one of int8, float8_e4m3fn, int4_zp"):
        fastdeploy.spec_from_config(asks("int8zp"))


def test_mla_is_refused_by_its_key():
    with pytest.raises(UnsupportedError, match="kv_lora_rank"):
        fastdeploy.spec_from_config(config() | {"kv_lora_rank": 512})
