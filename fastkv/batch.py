# SPDX-License-Identifier: Apache-2.0
"""What a backend knows of one step's batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastkv.contracts.numbers import is_integer
from fastkv.contracts.presence import require_kind, require_tensor
from fastkv.errors import ContractError, ShapeError
from fastkv.quant import QuantSpec
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

    def check(self, op: str, quant: QuantSpec) -> None:
        """Raise what can be seen without reading a tensor; `quant` is named in the errors."""
        for name, dims in _TENSORS.items():
            require_tensor(op, f"meta.{name}", getattr(self, name), f"an int32 {dims}", quant)
        if self.rope is not None:
            require_kind(op, "meta.rope", self.rope, Rope, quant)
            for name in ("cos", "sin"):
                table = getattr(self.rope, name)
                require_tensor(op, f"meta.rope.{name}", table, "a float32 table", quant)
        shape = getattr(self.cache_seqlens, "shape", None)
        if shape is None or len(shape) != 1:
            raise ShapeError(
                op,
                "meta.cache_seqlens",
                format=quant.name.value,
                expected="an int32 tensor [B]",
                got=type(self.cache_seqlens).__name__ if shape is None else str(list(shape)),
            )
        requests = self.num_requests
        _require_integer(op, "meta.num_decode", self.num_decode, requests, quant)
        if self.total_k is not None:
            _require_integer(op, "meta.total_k", self.total_k, None, quant)


_TENSORS = {
    "cu_seqlens_q": "tensor [B+1]",
    "cache_seqlens": "tensor [B]",
    "block_table": "tensor [B, M]",
}


def _require_integer(
    op: str, argument: str, value: Any, most: int | None, quant: QuantSpec
) -> None:
    """An integer of the host, at least 0; to compare a device's scalar would read it back."""
    if is_integer(value) and value >= 0 and (most is None or value <= most):
        return
    raise ContractError(
        op,
        argument,
        format=quant.name.value,
        expected="a host integer of at least 0" if most is None else f"a host integer, 0 to {most}",
        got=repr(value) if is_integer(value) else type(value).__name__,
    )
