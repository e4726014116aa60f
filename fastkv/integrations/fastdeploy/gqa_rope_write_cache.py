# SPDX-License-Identifier: Apache-2.0
"""The engine's op that writes the prompt tokens and leaves contiguous K and V."""

from typing import Any

from fastkv import ops
from fastkv.cache import LayerCache
from fastkv.contracts.numbers import is_integer
from fastkv.errors import ContractError
from fastkv.integrations.fastdeploy.arguments import describe_qkv, norm_arguments
from fastkv.integrations.fastdeploy.calls import older_calls, refuse_unserved, reported_as
from fastkv.integrations.fastdeploy.layer_cache import layer_cache, names_of
from fastkv.integrations.fastdeploy.requests import Requests
from fastkv.integrations.fastdeploy.rotary import rope_of
from fastkv.integrations.fastdeploy.tensors import flat_int32, load_paddle

_OP = "gqa_rope_write_cache"
_NORM = ("q_norm_weight", "k_norm_weight", "rms_norm_eps")
_NAMES = {
    "cache_seqlens": "seq_lens_decoder",
    "block_table": "block_tables",
    "norm_eps": "rms_norm_eps",
    "rope": "rotary_embs",
    "rope.cos": "rotary_embs",
    "rope.sin": "rotary_embs",
    "out_k": "kv_token_num",
}


@older_calls(("use_neox_rotary_style",), (*_NORM, "use_neox_rotary_style"))
def gqa_rope_write_cache(
    qkv: Any,
    key_cache: Any,
    value_cache: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    rotary_embs: Any,
    seq_lens_this_time: Any,
    seq_lens_encoder: Any,
    seq_lens_decoder: Any,
    batch_id_per_token: Any,
    block_tables: Any,
    kv_batch_ids: Any,
    kv_tile_ids_per_batch: Any,
    kv_num_blocks: Any,
    cache_batch_ids: Any,
    cache_tile_ids_per_batch: Any,
    cache_num_blocks: Any,
    q_norm_weight: Any = None,
    k_norm_weight: Any = None,
    cache_k_quant_scales: Any = None,
    cache_v_quant_scales: Any = None,
    cache_k_dequant_scales: Any = None,
    cache_v_dequant_scales: Any = None,
    cache_k_zp: Any = None,
    cache_v_zp: Any = None,
    kv_signal_data: Any = None,
    kv_token_num: int = 1,
    max_seq_len: int = 0,
    rms_norm_eps: float = 1e-6,
    use_neox_rotary_style: bool | None = None,
    cache_quant_type: str = "none",
    rope_3d: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """Rotate all rows, write the K and V of the prefill requests, and gather their prefixes.

    RoPE comes first and the norm after it. Of decode requests (`seq_lens_encoder` 0) nothing is
    written to the cache, and their Q is rotated from position 0 on, as in the engine: no caller
    uses it.

    Args:
        qkv: `[T, (Hq + 2*Hkv) * D]`, bf16, fp16 or fp32.
        key_cache: `[N, Hkv, P, D_storage]`, written; any page size.
        value_cache: as `key_cache`.
        cu_seqlens_q: int32 `[B+1]`.
        cu_seqlens_k: int32 `[B+1]`, from `pre_cache_len_concat`.
        rotary_embs: float32 `[2, 1, max_len, 1, width]`; see `rope_of`.
        seq_lens_this_time: int32 `[B]`, new tokens.
        seq_lens_encoder: int32, new prompt tokens, 0 for decode; B rows or more.
        seq_lens_decoder: int32, cached tokens; likewise.
        batch_id_per_token: not read; neither are the other five of the plan.
        block_tables: int32 `[B, M]`.
        kv_batch_ids: plan.
        kv_tile_ids_per_batch: plan.
        kv_num_blocks: plan.
        cache_batch_ids: plan.
        cache_tile_ids_per_batch: plan.
        cache_num_blocks: plan.
        q_norm_weight: `[D]`, with `k_norm_weight`, or neither.
        k_norm_weight: as `q_norm_weight`.
        cache_k_quant_scales: see `layer_cache` for the six.
        cache_v_quant_scales: likewise.
        cache_k_dequant_scales: likewise.
        cache_v_dequant_scales: likewise.
        cache_k_zp: likewise.
        cache_v_zp: likewise.
        kv_signal_data: None.
        kv_token_num: `cu_seqlens_k[B]` as a host integer.
        max_seq_len: not read.
        rms_norm_eps: epsilon of both norms.
        use_neox_rotary_style: the style of the tables; None (older calls) reads it off their width.
        cache_quant_type: the format.
        rope_3d: False.

    Returns:
        `q [T, Hq, D]`; `k` and `v [kv_token_num, Hkv, D]`, prefix and new tokens of request b from
        row `cu_seqlens_k[b]` on; rotated `qkv [T, (Hq + 2*Hkv) * D]`.

    Raises:
        ContractError: an argument that is missing, misshapen or not served; nothing has been
            written then.
    """
    given = dict(locals())
    refuse_unserved(_OP, str(cache_quant_type), given)
    scales = {name: given[name] for name in _SCALES}
    cache = layer_cache(_OP, key_cache, value_cache, scales, cache_quant_type)
    fmt = cache.quant.name.value
    describe_qkv(_OP, qkv, fmt)
    norm = norm_arguments(_OP, q_norm_weight, k_norm_weight, rms_norm_eps, fmt)
    rope = rope_of(_OP, rotary_embs, cache.spec.head_dim, use_neox_rotary_style, fmt)
    requests = Requests.from_fields(_OP, given, fmt)
    count = requests.cached.shape[0]
    sums = flat_int32(_OP, "cu_seqlens_k", cu_seqlens_k, count + 1, fmt)
    total = _require_count(kv_token_num, fmt)
    with reported_as(_OP, _NAMES | names_of(scales)):
        return _run(qkv, cache, requests, sums, total, rope=rope, **norm)


_SCALES = (
    "cache_k_quant_scales",
    "cache_v_quant_scales",
    "cache_k_dequant_scales",
    "cache_v_dequant_scales",
    "cache_k_zp",
    "cache_v_zp",
)


def _run(
    qkv: Any, cache: LayerCache, requests: Requests, sums: Any, total: int, **write: Any
) -> tuple[Any, Any, Any, Any]:
    paddle = load_paddle()
    # A decode request has its new tokens in its segment and, in older versions of
    # pre_cache_len_concat, room for its prefix before them.
    room = paddle.diff(sums) - paddle.diff(requests.cu_seqlens_q)
    cached = paddle.where(requests.is_prefill, requests.cached, room)
    paged = requests.only(requests.is_prefill).paged() | {"cache_seqlens": cached}
    k, v = (
        ops.zeros_beside(qkv, (total, cache.spec.num_kv_heads, cache.spec.head_dim)) for _ in "kv"
    )
    q, new_k, new_v = ops.rope_write_kv(
        qkv, cache, **paged, **write, return_kv=True, out_k=k, out_v=v, cu_seqlens_k=sums
    )
    del paged["cu_seqlens_q"]
    ops.gather_kv(cache, **paged, cu_seqlens_k=sums, out_k=k, out_v=v)
    rotated = paddle.concat([q, new_k, new_v], axis=1).reshape(qkv.shape)
    return q, k, v, rotated


def _require_count(kv_token_num: Any, fmt: str) -> int:
    if is_integer(kv_token_num) and kv_token_num >= 0:
        return int(kv_token_num)
    raise ContractError(
        _OP,
        "kv_token_num",
        format=fmt,
        expected="a host integer of at least 0",
        got=repr(kv_token_num) if is_integer(kv_token_num) else type(kv_token_num).__name__,
    )
