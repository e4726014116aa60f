# SPDX-License-Identifier: Apache-2.0
"""`paged_attention` in NumPy."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.cache import LayerCache
from fastkv.ops.reference.attend import Softmax, attend, visible
from fastkv.ops.reference.paging import Paged, PagedKeys
from fastkv.ops.reference.values import Values

if TYPE_CHECKING:
    from numpy.typing import NDArray


def paged_attention(
    q: "NDArray[Any]",
    cache: LayerCache,
    *,
    cu_seqlens_q: "NDArray[np.int32]",
    cache_seqlens: "NDArray[np.int32]",
    block_table: "NDArray[np.int32]",
    scale: float | None,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    sinks: "NDArray[np.float32] | None",
    mask_offsets: "NDArray[np.int32] | None",
    out: "NDArray[Any]",
    lse: "NDArray[np.float32]",
) -> None:
    """Write `out` and `lse`."""
    check = Values("paged_attention", cache)
    page_size = cache.spec.page_size
    new = check.running_sum("cu_seqlens_q", cu_seqlens_q, len(q))
    lengths = check.lengths(cache_seqlens, new, block_table, page_size)
    lengths = np.where(new > 0, lengths, 0)  # a request without query rows reads nothing
    check.pages(block_table, np.zeros_like(lengths), lengths, len(cache.k), page_size)
    check.intervals(mask_offsets, cu_seqlens_q, lengths)
    k, v = Paged.of(cache, "k"), Paged.of(cache, "v")
    softmax = Softmax.of(scale, q.shape[-1], soft_cap, sinks)
    lse[...] = -np.inf
    out[int(cu_seqlens_q[-1]) :] = 0
    with np.errstate(all="ignore"):  # NaN and inf are values like others here
        for b in np.flatnonzero(new).tolist():
            rows = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
            intervals = None if mask_offsets is None else mask_offsets[rows]
            length = int(lengths[b])
            low, high = visible(int(new[b]), length, causal, window, intervals)
            keys = PagedKeys(k, v, block_table[b], length)
            out[rows], lse[rows] = attend(q[rows].astype(np.float32), keys, low, high, softmax)
