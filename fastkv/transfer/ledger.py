# SPDX-License-Identifier: Apache-2.0
"""Who may use which block: the one place that says a block is free again.

A block that a transfer may still read or write is *held*. A held block that its owner frees comes
back only when the last hold ends, so memory that an engine may still touch is never given out.
"""

from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from fastkv.errors import BlockIdError, TransferError
from fastkv.transfer.regions import Ids, check_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray


class BlockState(str, Enum):
    """What a block is to its cache."""

    FREE = "free"
    IN_USE = "in use"
    #: A transfer that is in doubt may still touch it; nobody gets it until that has settled.
    QUARANTINED = "quarantined"

    def __str__(self) -> str:
        return self.value


class Ledger:
    """The blocks of one cache.

    Args:
        num_blocks: N, all free at first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._owned = np.zeros(num_blocks, np.bool_)
        self._holds = np.zeros(num_blocks, np.int32)
        self._doubts = np.zeros(num_blocks, np.int32)
        self._generation = np.zeros(num_blocks, np.uint64)

    def state(self, block_id: int) -> BlockState:
        """What one block is."""
        (i,) = check_ids("Ledger.state", "block_id", [block_id], self.num_blocks)
        if self._doubts[i]:
            return BlockState.QUARANTINED
        return BlockState.IN_USE if self._owned[i] or self._holds[i] else BlockState.FREE

    def generation(self, block_id: int) -> int:
        """How many times a block has been given out."""
        (i,) = check_ids("Ledger.generation", "block_id", [block_id], self.num_blocks)
        return int(self._generation[i])

    def count(self, state: BlockState | str) -> int:
        """Blocks in a state."""
        state = BlockState(state)
        doubt = self._doubts > 0
        if state is BlockState.QUARANTINED:
            return int(doubt.sum())
        free = self._free()
        return int(free.sum() if state is BlockState.FREE else (~free & ~doubt).sum())

    def allocate(self, count: int) -> "NDArray[np.int64]":
        """Take free blocks, the lowest ids first, so that neighbours move as one run.

        Raises:
            TransferError: fewer are free; none is taken.
        """
        found = np.flatnonzero(self._free())[:count]
        if len(found) < count:
            reason = f"{count} blocks asked for, {len(found)} of {self.num_blocks} free"
            raise TransferError("Ledger.allocate", reason)
        self._give(found)
        return found

    def take(self, ids: Ids) -> None:
        """Take the named blocks, for an engine that picks them itself.

        Raises:
            BlockIdError: one of them is not free; none is taken.
        """
        found = self._check("Ledger.take", ids)
        self._require("Ledger.take", found, self._free(), BlockState.FREE)
        self._give(found)

    def free(self, ids: Ids) -> None:
        """Give blocks back. What a transfer holds comes back when it has settled.

        Raises:
            BlockIdError: one of them was not taken; none is given back.
        """
        found = self._check("Ledger.free", ids)
        self._require("Ledger.free", found, self._owned, BlockState.IN_USE)
        self._owned[found] = False

    def hold(self, ids: Ids) -> None:
        """A transfer begins to read or write blocks that are in use.

        Raises:
            BlockIdError: one of them is not in use; none is held.
        """
        found = self._check("Ledger.hold", ids)
        self._require("Ledger.hold", found, self._owned, BlockState.IN_USE)
        self._holds[found] += 1

    def release(self, ids: Ids) -> None:
        """The end of a `hold`: nothing can touch the blocks for it any more."""
        self._end("Ledger.release", ids, self._holds)

    def quarantine(self, ids: Ids) -> None:
        """What holds these blocks is in doubt."""
        found = self._check("Ledger.quarantine", ids)
        self._require("Ledger.quarantine", found, self._holds > 0, BlockState.IN_USE)
        self._doubts[found] += 1

    def settle(self, ids: Ids) -> None:
        """The end of a `quarantine`; the hold remains."""
        self._end("Ledger.settle", ids, self._doubts)

    def _free(self) -> "NDArray[np.bool_]":
        free: NDArray[np.bool_] = ~self._owned & (self._holds == 0)  # a doubt is about a hold
        return free

    def _give(self, found: "NDArray[np.int64]") -> None:
        self._owned[found] = True
        self._generation[found] += np.uint64(1)

    def _check(self, op: str, ids: Ids) -> "NDArray[np.int64]":
        return check_ids(op, "ids", ids, self.num_blocks)

    def _end(self, op: str, ids: Ids, counts: "NDArray[np.int32]") -> None:
        found = self._check(op, ids)
        self._require(op, found, counts > 0, BlockState.IN_USE)
        counts[found] -= 1

    def _require(
        self, op: str, ids: "NDArray[np.int64]", good: "NDArray[np.bool_]", state: BlockState
    ) -> None:
        wrong = ids[~good[ids]]
        if wrong.size:
            got = f"block {wrong[0]} {self.state(int(wrong[0]))}"
            raise BlockIdError(op, "ids", expected=f"blocks {state}", got=got)
