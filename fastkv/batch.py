# SPDX-License-Identifier: Apache-2.0
"""What a backend knows of one step's batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastkv.errors import ContractError
from fastkv.rope import Rope
from fastkv.spec import CacheSpec


@dataclass(frozen=True, slots=True)
class BatchMeta:
    """One engine step: B requests, their new tokens and their pages.

    The first `num_decode` requests are the decode and draft rows, the others prefill; `num_decode`
    and `total_k` are host integers that the engine already has, so nothing is read back from the
    device.

    Attributes:
        caches: the engine's flat list of cache tensors.
        spec: what that list holds.
        cu_seqlens_q: int32 `[B+1]`, running sum of new tokens: request b owns rows
            `cu_seqlens_q[b] .. cu_seqlens_q[b+1]`.
        cache_seqlens: int32 `[B]`, tokens of each request that were cached before this step.
        block_table: int32 `[B, M]`, page ids, -1 where unused.
        cu_seqlens_k: int32 `[B+1]`, running sum of cached plus new tokens; a request whose
            segment is empty (a decode request, say) takes no part in gathered K and V. Needed by
            the flash backends when there are prefill requests.
        total_k: rows of the gathered K and V, `cu_seqlens_k[B]` as a host integer.
        num_decode: how many of the requests, from the first, are decode or draft rows.
        rope: rotary tables; None where Q and K come rotated.
        mask_offsets: int32 `[T, 2]`, each query row's interval `[start, end)` of its request's
            keys; None where causality is all.
    """

    caches: Sequence[Any]
    spec: CacheSpec
    cu_seqlens_q: Any
    cache_seqlens: Any
    block_table: Any
    cu_seqlens_k: Any = None
    total_k: int | None = None
    num_decode: int = 0
    rope: Rope | None = None
    mask_offsets: Any = None

    @property
    def num_requests(self) -> int:
        """B, from the shape of `cache_seqlens`: metadata, never a value of a tensor."""
        return int(self.cache_seqlens.shape[0])

    def check(self, op: str) -> None:
        """Raise unless the host integers fit the batch."""
        requests = self.num_requests
        if not 0 <= self.num_decode <= requests:
            raise ContractError(
                op,
                "meta.num_decode",
                expected=f"0 to {requests} requests",
                got=str(self.num_decode),
            )
        if self.total_k is not None and self.total_k < 0:
            raise ContractError(op, "meta.total_k", expected="at least 0", got=str(self.total_k))
