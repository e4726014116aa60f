# SPDX-License-Identifier: Apache-2.0
"""The engine's ops that write the new tokens and attend over the pages."""

from typing import Any

from fastkv.integrations.fastdeploy.append import append
from fastkv.integrations.fastdeploy.tensors import described


def append_attention(
    qkv: Any,
    key_cache: Any,
    value_cache: Any,
    seq_lens_encoder: Any,
    seq_lens_decoder: Any,
    seq_lens_this_time: Any,
    batch_id_per_token: Any,
    cu_seqlens_q: Any,
    block_tables: Any,
    encoder_batch_ids: Any,
    encoder_tile_ids_per_batch: Any,
    encoder_num_blocks: Any,
    kv_batch_ids: Any,
    kv_tile_ids_per_batch: Any,
    kv_num_blocks: Any,
    decoder_batch_ids: Any,
    decoder_tile_ids_per_batch: Any,
    decoder_num_blocks: Any,
    set_max_lengths: Any,
    rotary_embs: Any = None,
    attn_mask: Any = None,
    qkv_bias: Any = None,
    qkv_scale: Any = None,
    k_quant_scale: Any = None,
    v_quant_scale: Any = None,
    k_dequant_scale: Any = None,
    v_dequant_scale: Any = None,
    cache_k_zp: Any = None,
    cache_v_zp: Any = None,
    linear_shift: Any = None,
    linear_smooth: Any = None,
    mask_offset: Any = None,
    kv_signal_data: Any = None,
    q_norm_weight: Any = None,
    k_norm_weight: Any = None,
    sinks: Any = None,
    rms_norm_eps: float = 1e-6,
    compute_type: str = "bf16",
    cache_quant_type: str = "none",
    use_neox_rotary_style: bool = False,
    rope_3d: bool = False,
    max_input_length: int = 0,
    quant_max_bound: float = 0.0,
    quant_min_bound: float = 0.0,
    out_linear_in_scale: float = -1.0,
    encoder_block_shape_q: int = 64,
    decoder_block_shape_q: int = 16,
    max_partition_size: int = 32768,
    encoder_max_partition_size: int = 32768,
    speculate_max_draft_token_num: int = 1,
    causal: bool = True,
    speculate_decoder: bool = False,
    sliding_window: int = 0,
    sink_size: int = 0,
    head_wise_full_hidden: int = 0,
) -> Any:
    """Write the new tokens' K and V, and attend over the pages.

    RoPE comes first and the norm after it. With `set_max_lengths[1] == 0` the op is about the
    decode requests alone: it writes nothing of requests with prompt tokens and leaves 0 in their
    rows. Otherwise it serves all.

    Args:
        qkv: `[T, (Hq + 2*Hkv) * D]`, bf16, fp16 or fp32.
        key_cache: `[N, Hkv, P, D_storage]`, written; any page size.
        value_cache: as `key_cache`.
        seq_lens_encoder: int32, new prompt tokens, 0 for decode; B rows or more.
        seq_lens_decoder: int32, cached tokens; likewise.
        seq_lens_this_time: int32 `[B]`, new tokens.
        batch_id_per_token: not read.
        cu_seqlens_q: int32 `[B+1]`.
        block_tables: int32 `[B, M]`.
        encoder_batch_ids: not read: a plan of the engine's kernels, as are the eight that follow.
        encoder_tile_ids_per_batch: plan.
        encoder_num_blocks: plan.
        kv_batch_ids: plan.
        kv_tile_ids_per_batch: plan.
        kv_num_blocks: plan.
        decoder_batch_ids: plan.
        decoder_tile_ids_per_batch: plan.
        decoder_num_blocks: plan.
        set_max_lengths: int32 on the CPU, the engine's `max_len_tensor_cpu`; entry 1 is read.
        rotary_embs: float32 `[2, 1, max_len, 1, width]`, see `rope_of`; None: no RoPE.
        attn_mask: None.
        qkv_bias: `[(Hq + 2*Hkv) * D]`, added in float32 before RoPE and rounded once.
        qkv_scale: None.
        k_quant_scale: see `layer_cache` for the six.
        v_quant_scale: likewise.
        k_dequant_scale: likewise.
        v_dequant_scale: likewise.
        cache_k_zp: likewise.
        cache_v_zp: likewise.
        linear_shift: None.
        linear_smooth: None.
        mask_offset: see `intervals`; stands in place of `causal`.
        kv_signal_data: None.
        q_norm_weight: `[D]`, with `k_norm_weight`, or neither.
        k_norm_weight: as `q_norm_weight`.
        sinks: `[Hq]`, bf16, fp16 or fp32, natural-log logits in the denominator only.
        rms_norm_eps: epsilon of both norms.
        compute_type: not read: qkv has the dtype.
        cache_quant_type: the format.
        use_neox_rotary_style: the style of the tables.
        rope_3d: False.
        max_input_length: not read.
        quant_max_bound: not read.
        quant_min_bound: not read.
        out_linear_in_scale: at most 0.
        encoder_block_shape_q: not read; neither are the four that follow.
        decoder_block_shape_q: plan.
        max_partition_size: plan.
        encoder_max_partition_size: plan.
        speculate_max_draft_token_num: plan; any number of draft tokens is served.
        causal: a row sees no key behind its own position.
        speculate_decoder: not read.
        sliding_window: keys that a row sees, its own included; 0: all.
        sink_size: 0.
        head_wise_full_hidden: 0.

    Returns:
        `[T, Hq * D]` in qkv's dtype; 0 in rows that see no key or belong to no request.

    Raises:
        ContractError: an argument that is missing, misshapen or not served; nothing has been
            written then.
    """
    return append("append_attention", dict(locals()))


def append_attention_with_output(
    qkv: Any,
    key_cache: Any,
    value_cache: Any,
    seq_lens_encoder: Any,
    seq_lens_decoder: Any,
    seq_lens_this_time: Any,
    batch_id_per_token: Any,
    cu_seqlens_q: Any,
    block_tables: Any,
    encoder_batch_ids: Any,
    encoder_tile_ids_per_batch: Any,
    encoder_num_blocks: Any,
    kv_batch_ids: Any,
    kv_tile_ids_per_batch: Any,
    kv_num_blocks: Any,
    decoder_batch_ids: Any,
    decoder_tile_ids_per_batch: Any,
    decoder_num_blocks: Any,
    set_max_lengths: Any,
    out: Any,
    rotary_embs: Any = None,
    attn_mask: Any = None,
    qkv_bias: Any = None,
    qkv_scale: Any = None,
    k_quant_scale: Any = None,
    v_quant_scale: Any = None,
    k_dequant_scale: Any = None,
    v_dequant_scale: Any = None,
    cache_k_zp: Any = None,
    cache_v_zp: Any = None,
    linear_shift: Any = None,
    linear_smooth: Any = None,
    mask_offset: Any = None,
    kv_signal_data: Any = None,
    q_norm_weight: Any = None,
    k_norm_weight: Any = None,
    sinks: Any = None,
    rms_norm_eps: float = 1e-6,
    compute_type: str = "bf16",
    cache_quant_type: str = "none",
    use_neox_rotary_style: bool = False,
    rope_3d: bool = False,
    max_input_length: int = 0,
    quant_max_bound: float = 0.0,
    quant_min_bound: float = 0.0,
    out_linear_in_scale: float = -1.0,
    encoder_block_shape_q: int = 64,
    decoder_block_shape_q: int = 16,
    max_partition_size: int = 32768,
    encoder_max_partition_size: int = 32768,
    speculate_max_draft_token_num: int = 1,
    causal: bool = True,
    speculate_decoder: bool = False,
    sliding_window: int = 0,
) -> Any:
    """`append_attention` into a tensor that the caller has.

    `out` is `[T, Hq * D]` in qkv's dtype, dense, and written whole. The other arguments, and the
    errors, are those of `append_attention`.

    Returns:
        `out`.
    """
    given = dict(locals())
    op = "append_attention_with_output"
    described(op, "out", out, "a tensor [T, Hq * D]", str(cache_quant_type))
    return append(op, given)
