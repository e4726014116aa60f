# SPDX-License-Identifier: Apache-2.0
"""Copy whole pages within a cache."""

from typing import TYPE_CHECKING, Any

from fastkv.contracts import calls
from fastkv.ops import dispatch

if TYPE_CHECKING:
    from fastkv.cache import LayerCache


def copy_pages(cache: "LayerCache", src: Any, dst: Any) -> None:
    """Copy K, V and, where the format pages them, their scales: page `src[i]` to page `dst[i]`.

    Args:
        cache: the layer's cache; written.
        src: int32 `[n]` page ids.
        dst: int32 `[n]` page ids. No page is written twice, and none is both read and written: the
            pairs have no order. A pair with -1 on either side is dropped.

    Raises:
        ContractError: as in `rope_write_kv`; on the reference also page ids out of range, written
            twice, or both read and written. Nothing has been written then.
    """
    call = calls.copy_pages(cache, src, dst)
    if call.sizes["n"]:
        dispatch.runner(call)(cache, src, dst)
