# SPDX-License-Identifier: Apache-2.0
"""`copy_pages` in NumPy."""

from typing import TYPE_CHECKING

import numpy as np

from fastkv.cache import LayerCache
from fastkv.ops.reference.values import Values

if TYPE_CHECKING:
    from numpy.typing import NDArray


def copy_pages(cache: LayerCache, src: "NDArray[np.int32]", dst: "NDArray[np.int32]") -> None:
    """Copy page `src[i]` to page `dst[i]` in every tensor of the layer."""
    check = Values("copy_pages", cache)
    check.apart(cache)
    num_pages = len(cache.k)
    for name, ids in (("src", src), ("dst", dst)):
        if (bad := (ids < -1) | (ids >= num_pages)).any():
            i = int(np.argmax(bad))
            raise check.fault(f"{name}[{i}]", f"-1 to {num_pages - 1}", ids[i])
    kept = (src >= 0) & (dst >= 0)
    pages, counts = np.unique(dst[kept], return_counts=True)
    if (counts > 1).any():
        raise check.fault("dst", "each page at most once", f"page {pages[counts > 1][0]} twice")
    moved = kept & (src != dst)
    if (both := np.intersect1d(src[moved], dst[kept])).size:
        raise check.fault("src", "no page that dst writes", f"page {both[0]} in both")
    for tensor in (cache.k, cache.v, cache.k_scale, cache.v_scale):
        if tensor is not None:
            tensor[dst[kept]] = tensor[src[kept]]
