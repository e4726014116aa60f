# SPDX-License-Identifier: Apache-2.0
"""The order in which FastDeploy's attention backends call their ops, with their positions.

As in the engine, a module holds the ops under their names, and None where there is no GPU;
`fastkv.integrations.fastdeploy.install` fills them in. What an op is given is written down from
the engine's develop branch of January 2026, in the order of its parameters.
"""

from types import SimpleNamespace

import paddle

append_attention = None
append_attention_with_output = None
flash_attn_unpadded = None
flash_mask_attention = None
get_block_shape_and_split_kv_block = None
gqa_rope_write_cache = None
merge_prefill_decode_output = None
pre_cache_len_concat = None


def caches_of(layer, meta):
    """K, V and what stands for the quant multipliers: paged for the dynamic format."""
    if layer.cache_quant_type_str == "block_wise_fp8":
        return meta.caches[4 * layer.layer_id : 4 * layer.layer_id + 4]
    k, v = meta.caches[2 * layer.layer_id : 2 * layer.layer_id + 2]
    return k, v, getattr(layer, "cache_k_scale", None), getattr(layer, "cache_v_scale", None)


def static_of(layer):
    names = ("cache_k_out_scale", "cache_v_out_scale", "cache_k_zp", "cache_v_zp")
    return [getattr(layer, name, None) for name in names]


def prepare(config, meta):
    """Once a step: the longest lengths, and the plan."""
    get_block_shape_and_split_kv_block(
        *(meta.seq_lens_encoder, meta.seq_lens_decoder, meta.seq_lens_this_time),
        *(meta.decoder_batch_ids, meta.decoder_tile_ids_per_batch),
        *(meta.decoder_num_blocks_cpu, meta.decoder_num_blocks_device),
        *(meta.decoder_chunk_size_device, meta.max_len_tensor_cpu),
        *(meta.encoder_batch_ids, meta.encoder_tile_ids_per_batch, meta.encoder_num_blocks_x_cpu),
        *(meta.kv_batch_ids, meta.kv_tile_ids_per_batch, meta.kv_num_blocks_x_cpu),
        *(config.encoder_block_shape_q, config.decoder_block_shape_q),
        *(config.num_heads // config.kv_num_heads, config.block_size),
    )


def plan(meta):
    """The nine buffers that lie between the block tables and the lengths of append_attention."""
    stages = ("encoder", "kv", "decoder")
    counts = {"encoder": "encoder_num_blocks_x_cpu", "kv": "kv_num_blocks_x_cpu"}
    for stage in stages:
        yield getattr(meta, f"{stage}_batch_ids")
        yield getattr(meta, f"{stage}_tile_ids_per_batch")
        yield getattr(meta, counts.get(stage, "decoder_num_blocks_cpu"))


def append_arguments(config, qkv, layer, meta, lengths, out=()):
    k, v, k_scale, v_scale = caches_of(layer, meta)
    return [
        *(qkv, k, v, meta.seq_lens_encoder, meta.seq_lens_decoder, meta.seq_lens_this_time),
        *(meta.batch_id_per_token, meta.cu_seqlens_q, meta.block_tables, *plan(meta), lengths),
        *(*out, meta.rotary_embs, meta.attn_mask, layer.qkv_bias, layer.qkv_scale),
        *(k_scale, v_scale, *static_of(layer), layer.linear_shift, layer.linear_smooth),
        *(meta.attn_mask_offsets, None),
        *(layer.q_norm_weight, layer.k_norm_weight, getattr(layer, "sinks", None)),
        *(layer.rms_norm_eps, "bf16", layer.cache_quant_type_str, layer.use_neox_rotary_style),
        *(False, config.max_seq_len, layer.quant_max_bound, -layer.quant_max_bound, -1.0),
        *(config.encoder_block_shape_q, config.decoder_block_shape_q, 32768, config.max_seq_len),
        *(config.draft_tokens + 1, config.causal, config.draft_tokens > 0),
    ]


def append(config, qkv, layer, meta):
    """append_attention for all rows."""
    prepare(config, meta)
    arguments = append_arguments(config, qkv, layer, meta, meta.max_len_tensor_cpu)
    return append_attention(*arguments, layer.sliding_window)


def append_into(config, qkv, layer, meta):
    """The same into an output of the backend's."""
    prepare(config, meta)
    out = paddle.full([qkv.shape[0], config.num_heads * config.head_dim], 7.0).astype(qkv.dtype)
    arguments = append_arguments(config, qkv, layer, meta, meta.max_len_tensor_cpu, out=(out,))
    assert append_attention_with_output(*arguments, layer.sliding_window) is out
    return out


def write_cache(config, qkv, layer, meta, sums, total):
    k, v, k_scale, v_scale = caches_of(layer, meta)
    nothing = [None] * 3
    arguments = {
        "all": [
            *(qkv, k, v, meta.cu_seqlens_q, sums, meta.rotary_embs, meta.seq_lens_this_time),
            *(meta.seq_lens_encoder, meta.seq_lens_decoder, meta.batch_id_per_token),
            *(meta.block_tables, meta.kv_batch_ids, meta.kv_tile_ids_per_batch),
            *(meta.kv_num_blocks_x_cpu, *nothing),
        ],
        "norm": [layer.q_norm_weight, layer.k_norm_weight],
        "scales": [k_scale, v_scale, *static_of(layer), None, total, config.max_seq_len],
        "eps": [layer.rms_norm_eps],
        "neox": [layer.use_neox_rotary_style],
        "end": [layer.cache_quant_type_str, False],
    }
    return gqa_rope_write_cache(
        *(x for name, part in arguments.items() if name not in config.omitted for x in part)
    )


def prefill_and_decode(attend):
    """What flash and flash_mask share; `attend` fills the prefill rows."""

    def run(config, qkv, layer, meta):
        prepare(config, meta)
        lengths = meta.max_len_tensor_cpu
        has_prefill = lengths[1].item() > 0
        if has_prefill:
            lengths = lengths.clone()
            lengths[1] = 0
            of_prompt = [] if "encoder" in config.omitted else [meta.seq_lens_encoder]
            sums, *_, total = pre_cache_len_concat(
                *of_prompt,
                *(meta.seq_lens_decoder, meta.seq_lens_this_time),
                *(meta.max_len_tensor_cpu[2], config.block_size),
            )
            q, k, v, _ = write_cache(config, qkv, layer, meta, sums, total[0].item())
            found = attend(config, SimpleNamespace(q=q, k=k, v=v, sums=sums), qkv, meta)
        decoded = append_attention(*append_arguments(config, qkv, layer, meta, lengths))
        if not has_prefill:
            return decoded
        merge_prefill_decode_output(
            *(found, decoded, meta.seq_lens_encoder, meta.seq_lens_decoder),
            *(meta.seq_lens_this_time, meta.cu_seqlens_q, config.num_heads, config.head_dim),
            config.draft_tokens + 1,
        )
        return found

    return run


@prefill_and_decode
def flash(config, kv, qkv, meta):
    """Paddle's flash attention on the prefill rows."""
    out = flash_attn_unpadded(
        *(kv.q, kv.k, kv.v, meta.cu_seqlens_q, kv.sums),
        max_seqlen_q=meta.max_len_tensor_cpu[0],
        max_seqlen_k=meta.max_len_tensor_cpu[3],
        causal=config.causal,
        scale=config.head_dim**-0.5,
        training=False,
    )
    return out[0].reshape([qkv.shape[0], config.num_heads * config.head_dim])


@prefill_and_decode
def flash_mask(config, kv, qkv, meta):
    """The engine's own kernel, with an interval of keys a row."""
    out = paddle.zeros([qkv.shape[0], config.num_heads * config.head_dim], dtype=qkv.dtype)
    counts = [] if "counts" in config.omitted else [config.max_seq_len, kv.q.shape[0], 0]
    flash_mask_attention(
        *(kv.q, kv.k, kv.v, meta.cu_seqlens_q, kv.sums, meta.seq_lens_encoder, out),
        *(meta.attn_mask_offsets, config.num_heads, config.kv_num_heads, config.head_dim),
        *counts,
    )
    return out
