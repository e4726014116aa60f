# SPDX-License-Identifier: Apache-2.0
"""Split, QK-norm, RoPE, quantize and write the new tokens of a batch."""

from typing import TYPE_CHECKING, Any

from fastkv.contracts import calls
from fastkv.ops import dispatch

if TYPE_CHECKING:
    from fastkv.cache import LayerCache
    from fastkv.rope import Rope


def rope_write_kv(
    qkv: Any,
    cache: "LayerCache",
    *,
    cu_seqlens_q: Any,
    cache_seqlens: Any,
    block_table: Any,
    rope: "Rope | None" = None,
    q_norm_weight: Any = None,
    k_norm_weight: Any = None,
    norm_eps: float = 1e-6,
    norm_after_rope: bool = False,
    return_kv: bool = False,
    out_k: Any = None,
    out_v: Any = None,
    cu_seqlens_k: Any = None,
) -> Any:
    """Write K and V of the new tokens into the cache, and return the rotated Q.

    Token j of request b is row `cu_seqlens_q[b] + j` of `qkv` and goes to position
    `cache_seqlens[b] + j`: page `block_table[b, position // P]`, slot `position % P`. All
    arithmetic is float32; K and V are quantized after norm and RoPE, by the formulas of the
    format (docs, "Formats").

    Args:
        qkv: `[T, (Hq + 2*Hkv) * D]`, bf16, fp16 or fp32: query heads, key heads, value heads.
        cache: the layer's cache; its tensors are written.
        cu_seqlens_q: int32 `[B+1]`. Rows outside `cu_seqlens_q[0] .. cu_seqlens_q[B]` write
            nothing to the cache and get q = 0.
        cache_seqlens: int32 `[B]`, tokens cached before this step.
        block_table: int32 `[B, M]`; a write to page -1 is dropped.
        rope: tables that reach every position; None leaves Q and K as they are.
        q_norm_weight: `[D]`, bf16, fp16 or fp32; RMS norm of each query head,
            `x / sqrt(mean(x^2) + eps) * w` (Zhang and Sennrich, arXiv:1910.07467). None: no norm.
        k_norm_weight: as `q_norm_weight`, for the key heads.
        norm_eps: epsilon of both norms.
        norm_after_rope: norm after the rotation instead of before it.
        return_kv: also return the rotated, unquantized K and V of the new tokens.
        out_k: `[Tk, Hkv, D]`, written: row `cu_seqlens_k[b] + cache_seqlens[b] + j` gets the
            rotated, unquantized K of token j. Comes with `out_v` and `cu_seqlens_k`.
        out_v: as `out_k`, for V.
        cu_seqlens_k: int32 `[B+1]`, cached plus new tokens, neither more nor less; a request with
            an empty segment is not written to `out_k` and `out_v`.

    Returns:
        `q [T, Hq, D]` in qkv's dtype; with `return_kv`, `(q, k [T, Hkv, D], v [T, Hkv, D])`.

    Raises:
        ContractError: what tensors are missing, surplus, misshapen, of a wrong dtype, library or
            device; on the reference also lengths, page ids and positions out of range. Nothing
            has been written then.
    """
    call = calls.rope_write_kv(
        qkv,
        cache,
        cu_seqlens_q,
        cache_seqlens,
        block_table,
        rope,
        q_norm_weight,
        k_norm_weight,
        norm_eps,
        out_k,
        out_v,
        cu_seqlens_k,
    )
    dtype = call.dtype("qkv")
    q = dispatch.result(call, ("T", "Hq", "D"), dtype)
    k = dispatch.result(call, ("T", "Hkv", "D"), dtype) if return_kv else None
    v = dispatch.result(call, ("T", "Hkv", "D"), dtype) if return_kv else None
    if call.sizes["T"]:
        dispatch.runner(call)(
            qkv,
            cache,
            cu_seqlens_q=cu_seqlens_q,
            cache_seqlens=cache_seqlens,
            block_table=block_table,
            rope=rope,
            q_norm_weight=q_norm_weight,
            k_norm_weight=k_norm_weight,
            norm_eps=norm_eps,
            norm_after_rope=norm_after_rope,
            q=q,
            k=k,
            v=v,
            out_k=out_k,
            out_v=out_v,
            cu_seqlens_k=cu_seqlens_k,
        )
    return (q, k, v) if return_kv else q
