# SPDX-License-Identifier: Apache-2.0
"""Which page holds which tokens of which request, on the device and without reading it back.

All requests of a cache are equally long (padding counts), so a column of the block table is full,
partly filled or empty for all of them at once. Each column has one page a request of its own. A
full column is never written again, so that after a reordering several requests may point to one
of its pages; the column that is being filled is copied to a spare set of pages, which it then owns.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class Copies(NamedTuple):
    """Pages to copy in every layer: `src[i]` to `dst[i]`, int32 `[B]` each."""

    src: "torch.Tensor"
    dst: "torch.Tensor"


class Pages:
    """The block table of a batch.

    Attributes:
        table: int32 `[B, M]`, what the ops read.
        count: N, pages that the cache tensors need.
    """

    def __init__(self, batch: int, columns: int, page_size: int, device: Any) -> None:
        self.page_size = page_size
        self.count = 0
        self._batch, self._device = batch, device
        self._own = self._new(columns)
        self._spare: Any = None
        self._shares = False  # whether requests may point to each other's full pages
        self.table = self._own.clone()

    @property
    def columns(self) -> int:
        """M, pages a request."""
        return int(self.table.shape[1])

    @property
    def capacity(self) -> int:
        """Tokens a request that there are pages for."""
        return self.columns * self.page_size

    def _new(self, columns: int) -> Any:
        import torch

        first, self.count = self.count, self.count + self._batch * columns
        ids = torch.arange(first, self.count, dtype=torch.int32, device=self._device)
        return ids.view(self._batch, columns)

    def grow(self, columns: int) -> None:
        """More columns, up to M = `columns`."""
        import torch

        added = self._new(columns - self.columns)
        self._own = torch.cat([self._own, added], dim=1)
        self.table = torch.cat([self.table, added], dim=1)

    def reorder(self, indices: Any, length: int) -> Copies | None:
        """Request b becomes what `indices[b]` was; returns what must be copied before the next use.

        Args:
            indices: integers `[B]`, on the device.
            length: tokens of each request.
        """
        filled, begun = divmod(length, self.page_size)
        old = self.table.index_select(0, indices)
        self.table[:, :filled] = old[:, :filled]
        self._shares = True
        return self._move(filled, old[:, filled]) if begun else None

    def crop(self, length: int) -> Copies | None:
        """Make everything behind `length` tokens writable; returns what must be copied for that."""
        filled, begun = divmod(length, self.page_size)
        if not self._shares:
            return None
        held = self.table[:, filled].clone() if begun else None
        self.table[:, filled:] = self._own[:, filled:]
        return None if held is None else self._move(filled, held)

    def _move(self, column: int, src: Any) -> Copies:
        """Let a column's pages be copied to the spare set, and change places with it."""
        if self._spare is None:
            self._spare = self._new(1)[:, 0]
        dst = self._spare
        self._spare = self._own[:, column].clone()
        self._own[:, column] = dst
        self.table[:, column] = dst
        return Copies(src.contiguous(), dst)

    def reset(self) -> None:
        """All pages are their requests' own again."""
        self.table.copy_(self._own)
        self._shares = False
