# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged cache, in any format."""

from typing import TYPE_CHECKING, Any

from fastkv.contracts import calls
from fastkv.ops import dispatch

if TYPE_CHECKING:
    from fastkv.cache import LayerCache


def paged_attention(
    q: Any,
    cache: "LayerCache",
    *,
    cu_seqlens_q: Any,
    cache_seqlens: Any,
    block_table: Any,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Any = None,
    mask_offsets: Any = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Attention of new tokens over everything their requests have in the cache.

    The new tokens are in the cache already: request b has `L = cache_seqlens[b] + n` keys, n its
    query rows, and row j stands at position `p = cache_seqlens[b] + j` (causality aligned bottom
    right). The row sees key i when `i <= p` (if causal), `i > p - window` and `start <= i < end`
    of its interval; keys on page -1 are never seen. Then, with `s = scale * q.k`, capped to
    `soft_cap * tanh(s / soft_cap)`:

        out = sum(exp(s) * v) / (sum(exp(s)) + exp(sink)),  lse = log(sum(exp(s)))

    (the softmax of Vaswani et al., arXiv:1706.03762; sinks as in gpt-oss, arXiv:2508.10925). A
    row that sees no key gets out = 0 and lse = -inf.

    Args:
        q: `[T, Hq, D]`, bf16, fp16 or fp32, rotated. Hq is a multiple of Hkv; query head h reads
            KV head `h // G`.
        cache: the layer's cache; only read.
        cu_seqlens_q: int32 `[B+1]`; any number of query rows a request. Rows before
            `cu_seqlens_q[0]` belong to somebody else and are left alone; rows from
            `cu_seqlens_q[B]` on get out = 0, lse = -inf.
        cache_seqlens: int32 `[B]`, tokens cached before this step.
        block_table: int32 `[B, M]`.
        scale: multiplies q.k; None is `1 / sqrt(D)`.
        causal: a row sees no key behind its own position.
        window: how many keys a row sees to the left, its own included; None: all.
        soft_cap: None: no cap.
        sinks: float32 `[Hq]`, natural-log logits that enter the denominator only. The LSE leaves
            them out, so that a merge of two parts can apply them once.
        mask_offsets: int32 `[T, 2]`, `[start, end)` per query row, in keys of its own request.
        return_lse: also return the natural-log LSE.
        out: `[T, Hq, D]` in q's dtype, written and returned; None makes one.

    Returns:
        `out [T, Hq, D]` in q's dtype; with `return_lse`, `(out, lse)`, lse float32 `[T, Hq]`.

    Raises:
        ContractError: as in `rope_write_kv`.
    """
    call = calls.paged_attention(
        q,
        cache,
        cu_seqlens_q,
        cache_seqlens,
        block_table,
        mask_offsets,
        scale,
        window,
        soft_cap,
        sinks,
        out,
    )
    out = dispatch.result(call, ("T", "Hq", "D"), call.dtype("q")) if out is None else out
    lse = dispatch.result(call, ("T", "Hq"), "float32", needed=return_lse)
    if call.sizes["T"]:
        dispatch.runner(call)(
            q,
            cache,
            cu_seqlens_q=cu_seqlens_q,
            cache_seqlens=cache_seqlens,
            block_table=block_table,
            scale=scale,
            causal=causal,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            mask_offsets=mask_offsets,
            out=out,
            lse=lse,
        )
    return (out, lse) if return_lse else out
