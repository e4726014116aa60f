# SPDX-License-Identifier: Apache-2.0
"""A step's batch as one rank sees it, made by arithmetic on the batch's own device.

Two views. What is written goes by global positions, which RoPE needs, through a block table that
holds -1 for the pages of other ranks: writes there are dropped. What is read goes by a block table
of this rank's pages alone, so that no time is spent on the others', and by one interval of its keys
a row. A rank's keys are in the order of the context, so causality, window and the caller's own
intervals are each an interval of local keys.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastkv import arrays
from fastkv.arrays import ArrayInfo
from fastkv.distributed import tensors
from fastkv.distributed.placement import Placement

if TYPE_CHECKING:
    from fastkv.cache import LayerCache

_MOST = 2**30  # more tokens than any context; exact in float32, through which Paddle passes bounds


class Local:
    """One rank's part of a step.

    Args:
        placement: which tokens are this rank's.
        sums: int32 cu_seqlens_q `[B+1]`, from 0.
        cached: int32 cache_seqlens `[B]`, of the whole context.
        table: int32 block_table `[B, M]`, of the whole context.
        mask: int32 mask_offsets `[T, 2]`, in keys of the whole context, or None.
        infos: of `sums`, `cached` and `table`.
    """

    def __init__(
        self,
        placement: Placement,
        sums: Any,
        cached: Any,
        table: Any,
        mask: Any,
        infos: Sequence[ArrayInfo],
    ) -> None:
        self._placement = placement
        self._sums, self._cached, self._table, self._mask = sums, cached, table, mask
        self._infos = infos
        self._new = sums[1:] - sums[:-1]
        self._read: dict[int, dict[str, Any]] = {}
        self._intervals: dict[tuple[int, bool, int | None], Any] = {}
        self._checked: set[int] = set()
        self.written = {
            "cu_seqlens_q": sums,
            "cache_seqlens": cached,
            "block_table": self._among_others(),
        }

    def read(self, rows: int) -> dict[str, Any]:
        """The batch of `paged_attention` over this rank's keys, T rows.

        The op counts `cache_seqlens + n` keys of a request with n rows, which may be more than a
        rank holds; `intervals` keeps rows from the surplus, and -1 stands for its pages.
        """
        if rows not in self._read:
            keys = self._placement.keys(self._cached + self._new)
            self._read[rows] = {
                "cu_seqlens_q": self._sums,
                "cache_seqlens": (keys - self._new).clip(0, _MOST),
                "block_table": self._alone(rows),
            }
        return self._read[rows]

    def intervals(self, rows: int, causal: bool, window: int | None) -> Any:
        """Int32 `[T, 2]`: which of this rank's keys each row sees."""
        key = (rows, causal, window)
        if key not in self._intervals:
            self._intervals[key] = self._make_intervals(rows, causal, window)
        return self._intervals[key]

    def check_values(self, op: str, cache: "LayerCache", rows: int) -> None:
        """What the op would find in the whole batch's values; on the CPU alone, once a step."""
        if self._infos[0].device != "cpu" or rows in self._checked:
            return
        from fastkv.ops.reference.values import Values

        sums, cached, table = map(arrays.to_host, (self._sums, self._cached, self._table))
        check = Values(op, cache)
        new = check.running_sum("cu_seqlens_q", sums, rows)
        lengths = check.lengths(cached, new, table, self._placement.page_size)
        mask = None if self._mask is None else arrays.to_host(self._mask)
        check.intervals(mask, sums, lengths)
        self._checked.add(rows)

    def _among_others(self) -> Any:
        """The block table with -1 for the pages of other ranks."""
        info = self._infos[2]
        rank, size = self._placement.rank, self._placement.size
        if size == 1:
            return self._table
        table = arrays.zeros_like(info, info.shape, "int32") - 1
        if rank < info.shape[1]:
            table[:, rank::size] = self._table[:, rank::size]
        return table

    def _alone(self, rows: int) -> Any:
        """The block table of this rank's pages, with room for as many tokens as there are rows."""
        info = self._infos[2]
        rank, size, page = self._placement.rank, self._placement.size, self._placement.page_size
        own = len(range(rank, info.shape[1], size))
        columns = max(own, -(-rows // page))
        table = arrays.zeros_like(info, (info.shape[0], columns), "int32") - 1
        if own:
            table[:, :own] = self._table[:, rank::size]
        return table

    def _make_intervals(self, rows: int, causal: bool, window: int | None) -> Any:
        intervals = arrays.zeros_like(self._infos[0], (rows, 2), "int32")
        if not rows or not self._infos[1].shape[0]:
            return intervals
        numbers, requests = tensors.rows_and_requests(self._sums, self._infos[0], rows)
        # Rows behind the last request count to it; nobody reads their interval.
        length = (self._cached + self._new)[requests]
        position = (self._cached - self._sums[:-1])[requests] + numbers
        start, end = length * 0, length
        if causal:
            end = _least(end, position + 1)
        if window is not None:
            start = (position + 1 - min(window, _MOST)).clip(0, _MOST)
        if self._mask is not None:
            start = _most(start, self._mask[:, 0])
            end = _most(start, _least(end, self._mask[:, 1]))  # an empty one begins where it ends
        intervals[:, 0] = self._placement.keys(start)
        intervals[:, 1] = self._placement.keys(end)
        return intervals


def _most(a: Any, b: Any) -> Any:
    """The larger of two lengths, element by element, in any library."""
    return a + (b - a).clip(0, _MOST)


def _least(a: Any, b: Any) -> Any:
    return a - (a - b).clip(0, _MOST)
