# SPDX-License-Identifier: Apache-2.0
"""What a backend can find wrong with a step before it writes the step's K and V."""

from typing import TYPE_CHECKING, Any

from fastkv.contracts import calls
from fastkv.ops import dispatch

if TYPE_CHECKING:
    from fastkv.cache import LayerCache


def check_step(
    op: str,
    qkv: Any,
    cache: "LayerCache",
    *,
    cu_seqlens_q: Any,
    cache_seqlens: Any,
    block_table: Any,
    sinks: Any = None,
    mask_offsets: Any = None,
    cu_seqlens_k: Any = None,
    num_decode: int = 0,
) -> None:
    """Check what only a later op of the step would refuse, after `rope_write_kv` wrote the cache.

    Dtype, shape, library and device of `sinks` and `mask_offsets`; on the CPU also the intervals'
    values, and that no prefill request has an empty segment in `cu_seqlens_k`, which would leave
    its rows without keys. On other devices no value is read.

    Args:
        op: names the caller in the errors.
        qkv: `[T, (Hq + 2*Hkv) * D]`.
        cache: the layer's cache.
        cu_seqlens_q: int32 `[B+1]`.
        cache_seqlens: int32 `[B]`.
        block_table: int32 `[B, M]`.
        sinks: float32 `[Hq]`, or None.
        mask_offsets: int32 `[T, 2]`, or None.
        cu_seqlens_k: int32 `[B+1]`, where the step gathers K and V, else None.
        num_decode: requests, from the first, that need no segment in `cu_seqlens_k`.

    Raises:
        ContractError: as the later op would; nothing has been written.
    """
    batch = (cu_seqlens_q, cache_seqlens, block_table)
    call = calls.check_step(op, qkv, cache, *batch, sinks, mask_offsets, cu_seqlens_k)
    if call.sizes["T"]:
        dispatch.check_values(call, cache, *batch, mask_offsets, cu_seqlens_k, num_decode)
