# SPDX-License-Identifier: Apache-2.0
"""`gather_kv` in NumPy."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.cache import LayerCache
from fastkv.ops.reference.paging import Paged, PagedKeys
from fastkv.ops.reference.values import Values

if TYPE_CHECKING:
    from numpy.typing import NDArray


def gather_kv(
    cache: LayerCache,
    *,
    cache_seqlens: "NDArray[np.int32]",
    block_table: "NDArray[np.int32]",
    cu_seqlens_k: "NDArray[np.int32]",
    out_k: "NDArray[Any]",
    out_v: "NDArray[Any]",
) -> None:
    """Write the cached tokens of every request with a segment into `out_k` and `out_v`."""
    check = Values("gather_kv", cache)
    page_size = cache.spec.page_size
    lengths = check.lengths(cache_seqlens, np.zeros(1, np.int64), block_table, page_size)
    check.segments(cu_seqlens_k, len(out_k), lengths)
    takes_part = np.diff(cu_seqlens_k) > 0
    lengths = np.where(takes_part, lengths, 0)
    check.pages(block_table, np.zeros_like(lengths), lengths, len(cache.k), page_size)
    k, v = Paged.of(cache, "k"), Paged.of(cache, "v")
    with np.errstate(all="ignore"):  # NaN and inf are values like others here
        for b, length in enumerate(lengths.tolist()):
            keys = PagedKeys(k, v, block_table[b], length)
            _gather(keys, out_k[int(cu_seqlens_k[b]) :], out_v[int(cu_seqlens_k[b]) :])


def _gather(keys: PagedKeys, out_k: "NDArray[Any]", out_v: "NDArray[Any]") -> None:
    for start in range(0, keys.length, keys.chunk):
        stop = min(start + keys.chunk, keys.length)
        present = keys.present(start, stop)
        for side, out in (("k", out_k), ("v", out_v)):
            x = keys.read(side, start, stop)
            out[start:stop] = (
                x if present is None else np.where(present[:, None], x, 0)
            ).transpose(1, 0, 2)
