# SPDX-License-Identifier: Apache-2.0
"""Attention of prefill rows over contiguous K and V: two ops that the engine's backends call."""

from typing import Any

from fastkv import ops
from fastkv.contracts.numbers import is_finite
from fastkv.errors import ContractError, UnsupportedError
from fastkv.integrations.fastdeploy.calls import older_calls, reported_as
from fastkv.integrations.fastdeploy.masks import intervals
from fastkv.integrations.fastdeploy.requests import rows_of
from fastkv.integrations.fastdeploy.tensors import (
    assign_rows,
    described,
    flat_int32,
    require_dtype,
    require_shape,
)

_COUNTS = ("max_seq_len", "q_token_num", "kv_token_num")
_NAMES = {"mask_offsets": "attn_mask_offsets"}


@older_calls(_COUNTS)
def flash_mask_attention(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    seq_lens_encoder: Any,
    attn_out: Any,
    attn_mask_offsets: Any = None,
    num_heads: int = 0,
    kv_num_heads: int = 0,
    head_dim: int = 128,
    max_seq_len: int = 0,
    q_token_num: int = 0,
    kv_token_num: int = 0,
) -> None:
    """Attend in the rows of the prefill requests, and write these rows of `attn_out`.

    Args:
        q: `[T, Hq, D]`, from `gqa_rope_write_cache`.
        k: `[Tk, Hkv, D]`, likewise.
        v: as `k`.
        cu_seqlens_q: int32 `[B+1]`.
        cu_seqlens_k: int32 `[B+1]`.
        seq_lens_encoder: int32, 0 for decode; B rows or more.
        attn_out: `[T, Hq * D]` in q's dtype, dense; other rows are left alone.
        attn_mask_offsets: see `intervals`; without them attention is causal.
        num_heads: Hq.
        kv_num_heads: Hkv.
        head_dim: D.
        max_seq_len: not read.
        q_token_num: not read.
        kv_token_num: not read.

    Raises:
        ContractError: an argument that is missing or misshapen; nothing has been written then.
        UnsupportedError: on a GPU, what the kernel of `fastkv.ops.masked_attention` does not take.
    """
    op = "flash_mask_attention"
    info = described(op, "q", q, "a tensor [T, Hq, D]")
    keys = described(op, "k", k, "a tensor [Tk, Hkv, D]")
    require_shape(op, "q", info, (*info.shape[:1], num_heads, head_dim))
    require_shape(op, "k", keys, (*keys.shape[:1], kv_num_heads, head_dim))
    out = described(op, "attn_out", attn_out, "a tensor [T, Hq * D]")
    require_dtype(op, "attn_out", out, (info.dtype,))
    require_shape(op, "attn_out", out, (info.shape[0], num_heads * head_dim))
    sums = described(op, "cu_seqlens_q", cu_seqlens_q, "an int32 tensor [B+1]")
    count = max(sums.shape[0] - 1, 0) if sums.shape else 0
    served = flat_int32(op, "seq_lens_encoder", seq_lens_encoder, count) > 0
    rows = rows_of(served, cu_seqlens_q, info.shape[0])
    mask: dict[str, Any] = {"causal": True}
    if attn_mask_offsets is not None:
        offsets = intervals(op, "attn_mask_offsets", attn_mask_offsets, info.shape[0])
        # Those of decode rows speak of keys that K and V do not hold here.
        mask = {"causal": False, "mask_offsets": offsets * rows.unsqueeze(1).astype("int32")}
    with reported_as(op, _NAMES):
        found = ops.masked_attention(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **mask
        )
    assign_rows(rows, found.reshape(attn_out.shape), attn_out)


def flash_attn_unpadded(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    return_softmax: bool = False,
    **unread: Any,
) -> tuple[Any, None]:
    """In place of Paddle's `flash_attn_unpadded` and `flash_attention_v3_varlen`.

    The engine's flash backend calls one of them on prefill rows; on the CPU neither has a kernel.

    Args:
        query: `[T, Hq, D]`.
        key: `[Tk, Hkv, D]`.
        value: as `key`.
        cu_seqlens_q: int32 `[B+1]`.
        cu_seqlens_k: int32 `[B+1]`.
        max_seqlen_q: not read.
        max_seqlen_k: not read.
        scale: multiplies q.k; None is `1 / sqrt(D)`. `softmax_scale` is the same by its other name.
        dropout: 0.
        causal: a row sees no key behind its own position, aligned bottom right.
        return_softmax: False.
        **unread: `softmax_scale`, `training` and whatever else the two functions take.

    Returns:
        `(out [T, Hq, D], None)`.

    Raises:
        ContractError: as `fastkv.ops.masked_attention`.
    """
    op = "flash_attn_unpadded"
    for name, value_given in (("dropout", dropout), ("return_softmax", return_softmax)):
        if value_given:
            raise UnsupportedError(op, name, expected="0 or False", got=repr(value_given))
    factor = unread.get("softmax_scale") if scale is None else scale
    if factor is not None and not is_finite(factor):
        raise ContractError(op, "scale", expected="None or a finite number", got=repr(factor))
    names = {"q": "query", "k": "key", "v": "value"}
    with reported_as(op, names):
        out = ops.masked_attention(
            query,
            key,
            value,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            causal=bool(causal),
            scale=factor,
        )
    return out, None
