# SPDX-License-Identifier: Apache-2.0
"""Attention over contiguous K and V, with an interval of visible keys per row."""

from typing import Any

from fastkv.contracts import calls
from fastkv.ops import dispatch


def masked_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    mask_offsets: Any = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Any = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Attention of each request's query rows over its contiguous keys.

    Request b has `n` query rows and `L = cu_seqlens_k[b+1] - cu_seqlens_k[b]` keys; row j stands
    at position `p = L - n + j` (causality aligned bottom right; with n > L the first rows see
    nothing). What a row sees, and the formulas, are those of `paged_attention`.

    On a GPU, q, k and v are bf16 or all fp16 and of a head dim that the kernels serve, and a key's
    V must be finite even for rows that do not see it, where others of the same 128 query rows see
    a key of its tile: 128 keys, 64 at D 256.

    Args:
        q: `[T, Hq, D]`, bf16, fp16 or fp32, rotated; Hq a multiple of Hkv.
        k: `[Tk, Hkv, D]`, bf16, fp16 or fp32, rotated.
        v: `[Tk, Hkv, D]`, of k's dtype.
        cu_seqlens_q: int32 `[B+1]`; rows outside are treated as in `paged_attention`.
        cu_seqlens_k: int32 `[B+1]`, rows of k and v of each request.
        mask_offsets: int32 `[T, 2]`, `[start, end)` per query row, in keys of its own request; an
            empty interval is legal. It intersects with `causal` and `window`.
        causal: a row sees no key behind its own position.
        scale: multiplies q.k; None is `1 / sqrt(D)`.
        window: how many keys a row sees to the left, its own included; None: all.
        soft_cap: None: no cap.
        sinks: float32 `[Hq]`, natural-log logits in the denominator only, not in the LSE.
        return_lse: also return the natural-log LSE.
        out: `[T, Hq, D]` in q's dtype, written and returned; None makes one.

    Returns:
        `out [T, Hq, D]` in q's dtype; with `return_lse`, `(out, lse)`, lse float32 `[T, Hq]`.

    Raises:
        ContractError: as in `rope_write_kv`; on the reference also intervals with start > end or
            outside the request.
        UnsupportedError: a GPU too old, or a dtype, head dim, stride or address that its kernel
            does not take; nothing has been written then.
    """
    call = calls.masked_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, mask_offsets, scale, window, soft_cap, sinks, out
    )
    out = dispatch.result(call, ("T", "Hq", "D"), call.dtype("q")) if out is None else out
    lse = dispatch.result(call, ("T", "Hq"), "float32", needed=return_lse)
    if call.sizes["T"]:
        dispatch.runner(call)(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            mask_offsets=mask_offsets,
            causal=causal,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            out=out,
            lse=lse,
        )
    return (out, lse) if return_lse else out
