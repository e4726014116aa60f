# SPDX-License-Identifier: Apache-2.0
"""`masked_attention` in NumPy."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.ops.reference.attend import Softmax, attend, visible
from fastkv.ops.reference.paging import CHUNK_TOKENS
from fastkv.ops.reference.values import Values

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ContiguousKeys:
    """The keys of one request in contiguous K and V (a `KeySource`)."""

    chunk = CHUNK_TOKENS

    def __init__(self, k: "NDArray[Any]", v: "NDArray[Any]") -> None:
        self._sides = {"k": k, "v": v}
        self.length, self.heads = k.shape[:2]

    def read(self, side: str, start: int, stop: int) -> "NDArray[np.float32]":
        """Float32 `[Hkv, stop - start, D]`."""
        return self._sides[side][start:stop].astype(np.float32).transpose(1, 0, 2)

    def present(self, start: int, stop: int) -> None:
        """Every key exists."""


def masked_attention(
    q: "NDArray[Any]",
    k: "NDArray[Any]",
    v: "NDArray[Any]",
    *,
    cu_seqlens_q: "NDArray[np.int32]",
    cu_seqlens_k: "NDArray[np.int32]",
    mask_offsets: "NDArray[np.int32] | None",
    causal: bool,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    sinks: "NDArray[np.float32] | None",
    out: "NDArray[Any]",
    lse: "NDArray[np.float32]",
) -> None:
    """Write `out` and `lse`."""
    check = Values("masked_attention")
    new = check.running_sum("cu_seqlens_q", cu_seqlens_q, len(q))
    lengths = check.running_sum("cu_seqlens_k", cu_seqlens_k, len(k))
    check.intervals(mask_offsets, cu_seqlens_q, lengths)
    softmax = Softmax.of(scale, q.shape[-1], soft_cap, sinks)
    lse[...] = -np.inf
    out[int(cu_seqlens_q[-1]) :] = 0
    with np.errstate(all="ignore"):  # NaN and inf are values like others here
        for b in np.flatnonzero(new).tolist():
            rows = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
            own = slice(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
            intervals = None if mask_offsets is None else mask_offsets[rows]
            low, high = visible(int(new[b]), int(lengths[b]), causal, window, intervals)
            keys = ContiguousKeys(k[own], v[own])
            out[rows], lse[rows] = attend(q[rows].astype(np.float32), keys, low, high, softmax)
