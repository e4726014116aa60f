# SPDX-License-Identifier: Apache-2.0
"""Dequantize cached prefixes into contiguous K and V."""

from typing import TYPE_CHECKING, Any

from fastkv.contracts import calls
from fastkv.ops import dispatch

if TYPE_CHECKING:
    from fastkv.cache import LayerCache


def gather_kv(
    cache: "LayerCache",
    *,
    cache_seqlens: Any,
    block_table: Any,
    cu_seqlens_k: Any,
    out_k: Any,
    out_v: Any,
) -> None:
    """Read each request's cached tokens into rows `cu_seqlens_k[b] ..` of `out_k` and `out_v`.

    Dequantization is float32, by the formulas of the format (docs, "Formats"), then rounded to
    the outputs' dtype.

    Args:
        cache: the layer's cache; only read.
        cache_seqlens: int32 `[B]`, how many tokens to read of each request.
        block_table: int32 `[B, M]`; tokens on page -1 read as 0.
        cu_seqlens_k: int32 `[B+1]`; each segment is empty (the request is left out) or holds at
            least `cache_seqlens[b]` rows. Rows behind the cached tokens are left alone.
        out_k: `[Tk, Hkv, D]`, bf16, fp16 or fp32, written.
        out_v: as `out_k`.

    Raises:
        ContractError: as in `rope_write_kv`; nothing has been written then.
    """
    call = calls.gather_kv(cache, cache_seqlens, block_table, cu_seqlens_k, out_k, out_v)
    if not call.sizes["B"] or not call.sizes["Tk"]:
        return
    dispatch.runner(call)(
        cache,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        cu_seqlens_k=cu_seqlens_k,
        out_k=out_k,
        out_v=out_v,
    )
