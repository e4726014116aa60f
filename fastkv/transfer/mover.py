# SPDX-License-Identifier: Apache-2.0
"""Transfers on an engine, as futures. None can be stopped, so each is watched until it settles."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from fastkv.errors import TransferError
from fastkv.transfer.engine import Engine, Progress, descriptors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastkv.transfer.regions import Region

_T = TypeVar("_T")
# Short transfers are over within the first few looks; a long one costs a look a millisecond.
_LOOKS = (0.0, 0.0, 0.0, 0.0001, 0.0002, 0.0005, 0.001)


class Flight:
    """One part of a transfer, from the engine's point of view.

    Attributes:
        settled: its result is whether all bytes have arrived. Once it is done, nothing moves.
        posted: the engine has it; until then it can be dropped.
        reason: why it failed.
    """

    def __init__(self) -> None:
        self.settled: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.posted = False
        self.reason = ""

    def end(self, whole: bool, reason: str = "") -> None:
        """Settle, if it has not settled yet."""
        if not self.settled.done():
            self.reason = reason
            self.settled.set_result(whole)

    def drop(self, reason: str) -> None:
        """Do not post it, if it is not posted yet."""
        if not self.posted:
            self.end(False, reason)


class Mover:
    """An engine and its thread.

    Args:
        engine: called from one thread of this object's own, so a call that blocks stops no event
            loop.
        in_flight: transfers that the engine has at a time, at most; further ones wait.
    """

    def __init__(self, engine: Engine, in_flight: int) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"fastkv-{engine.name}")
        self._slots = asyncio.Semaphore(in_flight)
        self._flights: dict[asyncio.Task[None], tuple[Any, Flight]] = {}

    async def call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Call the engine in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def launch(
        self,
        peer: Any,
        write: bool,
        local: "tuple[Sequence[Region], NDArray[np.int64]]",
        remote: "tuple[Sequence[Region], NDArray[np.int64]]",
    ) -> Flight:
        """Move blocks to a peer or from it.

        Args:
            peer: the engine's.
            write: from here to there.
            local: this cache's regions, and ids of blocks.
            remote: the peer's, in the same order.
        """
        flight = Flight()
        task = asyncio.create_task(self._fly(flight, peer, write, local, remote))
        self._flights[task] = (peer, flight)
        task.add_done_callback(lambda done: self._flights.pop(done, None))
        return flight

    async def _fly(self, flight: Flight, peer: Any, write: bool, local: Any, remote: Any) -> None:
        async with self._slots:
            if flight.settled.done():
                return
            flight.posted = True
            try:
                handle = await self.call(self._post, peer, write, local, remote)
            except TransferError as error:
                flight.end(False, str(error))
                return
            await self._watch(flight, handle)

    def _post(self, peer: Any, write: bool, local: Any, remote: Any) -> Any:
        runs = descriptors(local[0], remote[0], local[1], remote[1])
        return self._engine.post(peer, write, *runs)

    async def _watch(self, flight: Flight, handle: Any) -> None:
        looks = 0
        try:
            while not flight.settled.done():
                progress = await self.call(self._engine.poll, handle)
                if progress is not Progress.MOVING:
                    whole = progress is Progress.DONE
                    flight.end(whole, "" if whole else "the engine reports a failure")
                await asyncio.sleep(_LOOKS[min(looks, len(_LOOKS) - 1)])
                looks += 1
        finally:
            await self.call(self._engine.release, handle)

    def forget(self, peer: Any) -> None:
        """The peer is gone for good: what is under way to or from it has failed."""
        for other, flight in tuple(self._flights.values()):
            if other is peer:
                flight.end(False, "the peer is gone")

    async def disconnect(self, peer: Any) -> None:
        """Let the engine forget a peer."""
        await self.call(self._engine.disconnect, peer)

    async def close(self) -> None:
        """Give up what is under way and close the engine."""
        for _, flight in tuple(self._flights.values()):
            flight.end(False, "closed")
        if self._flights:
            await asyncio.wait(tuple(self._flights), timeout=5)
        await self.call(self._engine.close)
        self._thread.shutdown(wait=False)
