# SPDX-License-Identifier: Apache-2.0
"""Faults in the values of a batch's metadata; each error names the request, and the row if one.

Only the reference reads values to refuse them: on a device that would be a synchronization.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.cache import LayerCache
from fastkv.errors import BatchValueError
from fastkv.scales.values import require_values

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Values:
    """The value checks of one call."""

    def __init__(self, op: str, cache: LayerCache | None = None) -> None:
        self.op = op
        self.format = None if cache is None else cache.quant.name.value
        if cache is not None and cache.static is not None:
            require_values(op, "cache.static", cache.static, cache.quant)

    def fault(self, argument: str, expected: str, got: object) -> BatchValueError:
        """The error for one value."""
        return BatchValueError(
            self.op, argument, format=self.format, expected=expected, got=str(got)
        )

    def running_sum(self, name: str, sums: "NDArray[Any]", rows: int) -> "NDArray[np.int64]":
        """Check a cu_seqlens; returns the lengths `[B]`."""
        counts: NDArray[np.int64] = sums[1:].astype(np.int64) - sums[:-1]
        if (counts < 0).any():
            b = int(np.argmax(counts < 0))
            raise self.fault(
                f"{name}[{b + 1}] of request {b}",
                f"at least {sums[b]}: it never decreases",
                sums[b + 1],
            )
        if sums[0] < 0 or sums[-1] > rows:
            b = 0 if sums[0] < 0 else int(np.argmax(sums > rows))
            raise self.fault(
                f"{name}[{b}] of request {max(b - 1, 0)}", f"0 to {rows} rows", sums[b]
            )
        return counts

    def lengths(
        self,
        cache_seqlens: "NDArray[Any]",
        new: "NDArray[Any]",
        block_table: "NDArray[Any]",
        page_size: int,
    ) -> "NDArray[np.int64]":
        """Check cached and new tokens against the block table; returns their sum `[B]`."""
        cached: NDArray[np.int64] = cache_seqlens.astype(np.int64)
        columns = block_table.shape[1]
        bad = (cached < 0) | (cached + new > columns * page_size)
        if bad.any():
            b = int(np.argmax(bad))
            raise self.fault(
                f"cache_seqlens[{b}] of request {b}",
                f"at least 0, and with {np.broadcast_to(new, cached.shape)[b]} new tokens at most "
                f"{columns * page_size} ({columns} pages of {page_size} in block_table)",
                cached[b],
            )
        return cached + new.astype(np.int64)

    def pages(
        self,
        block_table: "NDArray[Any]",
        start: "NDArray[Any]",
        stop: "NDArray[Any]",
        num_pages: int,
        page_size: int,
    ) -> None:
        """Check the page ids that tokens `start .. stop` of each request lie on."""
        column = np.arange(block_table.shape[1])
        used = (column >= (start // page_size)[:, None]) & (column < -(-stop // page_size)[:, None])
        used &= (start < stop)[:, None]
        bad = used & ((block_table < -1) | (block_table >= num_pages))
        if bad.any():
            b, m = (int(i) for i in np.argwhere(bad)[0])
            raise self.fault(
                f"block_table[{b}, {m}] of request {b}",
                f"-1 to {num_pages - 1}",
                block_table[b, m],
            )

    def one_writer(
        self, pages: "NDArray[Any]", slots: "NDArray[Any]", requests: "NDArray[Any]", size: int
    ) -> None:
        """Check that no two new tokens go to one place; each is (page, slot) of a request."""
        kept = np.flatnonzero(pages >= 0)
        place = pages[kept].astype(np.int64) * size + slots[kept]
        _, first, counts = np.unique(place, return_index=True, return_counts=True)
        if (counts > 1).any():
            shared = place[first[counts > 1][0]]
            owners = requests[kept[place == shared]]
            raise self.fault(
                f"block_table of requests {owners[0]} and {owners[1]}",
                "each new token a place of its own",
                f"page {shared // size}, slot {shared % size} twice",
            )

    def apart(self, cache: LayerCache) -> None:
        """Check that the tensors to write do not begin at one address."""
        tensors = {n: getattr(cache, n) for n in ("k", "v", "k_scale", "v_scale")}
        starts: dict[int, str] = {}
        for name, tensor in tensors.items():
            if tensor is None or not tensor.size:
                continue
            other = starts.setdefault(tensor.ctypes.data, name)
            if other != name:
                raise self.fault(
                    f"cache.{name}",
                    f"memory of its own, apart from cache.{other}'s",
                    "the same memory",
                )

    def segments(
        self,
        cu_seqlens_k: "NDArray[Any]",
        rows: int,
        needed: "NDArray[Any]",
        exact: "NDArray[np.bool_] | bool" = False,
    ) -> None:
        """Check that each request's segment of contiguous K and V is empty, or holds its tokens.

        Where `exact`, it holds no more than them: attention over a longer one would take the rows
        behind the tokens for keys.
        """
        counts = self.running_sum("cu_seqlens_k", cu_seqlens_k, rows)
        bad = (counts > 0) & ((counts < needed) | (exact & (counts > needed)))
        if bad.any():
            b = int(np.argmax(bad))
            least = "" if np.broadcast_to(exact, counts.shape)[b] else "at least "
            raise self.fault(
                f"cu_seqlens_k[{b + 1}] of request {b}",
                f"a segment of 0 or {least}{needed[b]} rows",
                counts[b],
            )

    def intervals(
        self,
        mask_offsets: "NDArray[Any] | None",
        cu_seqlens_q: "NDArray[Any]",
        lengths: "NDArray[Any]",
    ) -> None:
        """Check `[start, end)` of every query row against its request's keys."""
        if mask_offsets is None:
            return
        counts = np.diff(cu_seqlens_q)
        owners = np.repeat(np.arange(len(counts)), counts)
        rows = np.arange(cu_seqlens_q[0], cu_seqlens_q[-1])
        start, end = mask_offsets[rows, 0], mask_offsets[rows, 1]
        bad = (start < 0) | (start > end) | (end > lengths[owners])
        if bad.any():
            i = int(np.argmax(bad))
            raise self.fault(
                f"mask_offsets[{rows[i]}] of request {owners[i]}",
                f"0 <= start <= end <= {lengths[owners[i]]} keys",
                f"[{start[i]}, {end[i]})",
            )


def check_step(
    op: str,
    rows: int,
    cache: LayerCache,
    cu_seqlens_q: "NDArray[np.int32]",
    cache_seqlens: "NDArray[np.int32]",
    block_table: "NDArray[np.int32]",
    mask_offsets: "NDArray[np.int32] | None",
    cu_seqlens_k: "NDArray[np.int32] | None",
    num_decode: int,
) -> None:
    """The values that `fastkv.ops.check_step` is about."""
    check = Values(op, cache)
    new = check.running_sum("cu_seqlens_q", cu_seqlens_q, rows)
    lengths = check.lengths(cache_seqlens, new, block_table, cache.spec.page_size)
    check.intervals(mask_offsets, cu_seqlens_q, lengths)
    if cu_seqlens_k is None:
        return
    needs = (new > 0) & (np.arange(len(new)) >= num_decode)
    bad = needs & (np.diff(cu_seqlens_k) == 0)
    if bad.any():
        b = int(np.argmax(bad))
        raise check.fault(
            f"cu_seqlens_k[{b + 1}] of request {b}",
            f"a segment of {lengths[b]} rows for a prefill request",
            0,
        )
