# SPDX-License-Identifier: Apache-2.0
"""What fastkv asks of a transfer engine, and the descriptors that it hands over.

An engine moves bytes between registered memory of two processes. It knows nothing of blocks,
formats or requests, and it need not be able to stop what it has begun: `fastkv.transfer` assumes
that it cannot.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastkv.errors import unknown_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastkv.transfer.regions import Region


class Progress(Enum):
    """How far a posted transfer is."""

    MOVING = "moving"
    DONE = "done"
    #: It has ended without all bytes; nothing moves any more.
    FAILED = "failed"


class Engine(Protocol):
    """One engine in one process. All calls come from one thread.

    Any method may raise `TransferError`.
    """

    name: str

    def register(self, extents: Sequence[tuple[int, int]]) -> None:
        """Make memory, `(address, bytes)`, known to the engine."""

    def address(self) -> bytes:
        """What a peer's `connect` takes; complete once memory is registered."""

    def connect(self, address: bytes) -> Any:
        """A peer, from the bytes of its `address()`."""

    def post(
        self, peer: Any, write: bool, local: "NDArray[np.uint64]", remote: "NDArray[np.uint64]"
    ) -> Any:
        """Begin to move bytes and return a handle.

        Args:
            peer: from `connect`.
            write: from here to the peer; else from the peer to here.
            local: `[n, 2]`, address and bytes of each run.
            remote: `[n, 2]`, the runs' counterparts.
        """

    def poll(self, handle: Any) -> Progress:
        """How far a transfer is; does not wait."""

    def release(self, handle: Any) -> None:
        """Forget a handle. Its bytes may still move if it was not at its end."""

    def disconnect(self, peer: Any) -> None:
        """Forget a peer."""

    def close(self) -> None:
        """Forget all peers and all memory."""


def descriptors(
    local: "Sequence[Region]",
    remote: "Sequence[Region]",
    local_ids: "NDArray[np.int64]",
    remote_ids: "NDArray[np.int64]",
) -> "tuple[NDArray[np.uint64], NDArray[np.uint64]]":
    """The memory of blocks here and there, `[n, 2]` each: address and bytes of runs.

    Blocks that are neighbours on both sides become one run in each region whose pages are dense.
    """
    step = (np.diff(local_ids) != 1) | (np.diff(remote_ids) != 1)
    first = np.flatnonzero(np.concatenate([[True], step]))
    counts = np.diff(np.append(first, len(local_ids)))
    one = np.ones(len(local_ids), np.int64)
    here: list[NDArray[np.int64]] = []
    there: list[NDArray[np.int64]] = []
    for mine, theirs in zip(local, remote, strict=True):
        dense = mine.stride == mine.nbytes == theirs.stride
        at, blocks = (first, counts) if dense else (slice(None), one)
        for region, ids, out in ((mine, local_ids, here), (theirs, remote_ids, there)):
            start = region.address + ids[at] * region.stride
            out.append(np.stack([start, blocks * mine.nbytes], axis=1))
    return np.concatenate(here).astype(np.uint64), np.concatenate(there).astype(np.uint64)


def _nixl() -> Engine:
    from fastkv.transfer.nixl import NixlEngine

    return NixlEngine()


ENGINES: dict[str, Callable[[], Engine]] = {"nixl": _nixl}


def make_engine(name: str, op: str) -> Engine:
    """An engine by its name.

    Raises:
        UnknownNameError: no such engine.
        MissingDependencyError: its package is not installed.
    """
    if name not in ENGINES:
        raise unknown_name(op, "engine", name, ENGINES)
    return ENGINES[name]()
