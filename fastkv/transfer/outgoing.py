# SPDX-License-Identifier: Apache-2.0
"""The side that begins a transfer: push blocks to a peer, or pull them from it."""

import asyncio
from asyncio import FIRST_COMPLETED
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.errors import FastKVError, MalformedError, TransferError
from fastkv.transfer.outcome import Outcome, TransferState
from fastkv.transfer.regions import check_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastkv.transfer.mover import Flight
    from fastkv.transfer.session import Session
    from fastkv.transfer.wire import Message

# Seconds that an engine gets to say what became of a peer whose control channel is closed.
_GRACE = 1.0


class Attempt:
    """One transfer that this side began: it posts to the engine, and answers for the deadline.

    Attributes:
        replies: what the peer says about it.
        ids: blocks here that are held for it.
        flights: its parts on the engine.
    """

    def __init__(self, session: "Session", request: str, seconds: float) -> None:
        self.session = session
        self.request = request
        self.seconds = seconds
        self.generation = session.endpoint.next_generation()
        self.replies: asyncio.Queue[Message | None] = asyncio.Queue(4)
        self.ids = np.empty(0, np.int64)
        self.flights: list[Flight] = []
        self.announced = False  # the peer may hold blocks for it
        self.unheard = False  # the data has arrived, and the peer's word has not
        self.reason = ""

    async def reply(self, *kinds: str) -> "Message":
        """The peer's next word.

        Raises:
            TransferError: it refuses, or is gone.
        """
        message = await self.replies.get()
        if message is None:
            raise TransferError(self.request, "the peer is gone")
        if message.kind == "refused":
            self.announced = False
            raise TransferError(self.request, f"the peer refuses: {message.fields['reason']}")
        if message.kind not in kinds:
            raise MalformedError("transfer", f"{message.kind} where {' or '.join(kinds)} belongs")
        return message

    def hear(self, message: "Message | None") -> None:
        """Called with the peer's word, or None where it is gone."""
        if message is None:
            for flight in self.flights:  # nothing more goes to a peer whose blocks may come back
                flight.drop("the peer is gone")
        if not self.replies.full():  # no peer has this many words about one transfer
            self.replies.put_nowait(message)

    def parts(self) -> list[slice]:
        """The blocks in parts that the engine gets one at a time."""
        endpoint = self.session.endpoint
        step = max(1, endpoint.part_bytes // endpoint.regions.block_nbytes)
        return [slice(at, at + step) for at in range(0, len(self.ids), step)]

    def launch(self, write: bool, theirs: "NDArray[np.int64]") -> list[slice]:
        """Hand all parts to the mover, which posts a few at a time."""
        session, parts = self.session, self.parts()
        mine = session.endpoint.regions.regions
        self.flights = [
            session.endpoint.mover.launch(
                session.peer, write, (mine, self.ids[part]), (session.regions, theirs[part])
            )
            for part in parts
        ]
        return parts

    async def landed(self, flight: "Flight") -> None:
        """Wait for a part.

        Raises:
            TransferError: it failed.
        """
        # Shielded: a deadline that cancels this wait must not settle what still moves.
        if not await asyncio.shield(flight.settled):
            raise TransferError(self.request, flight.reason)

    async def body(self) -> None:
        """The transfer itself.

        Raises:
            FastKVError: it has failed.
        """
        raise NotImplementedError

    async def run(self) -> Outcome:
        """Run the transfer within its deadline, and leave every block where it belongs."""
        endpoint, started = self.session.endpoint, perf_counter()
        self.session.attempts[self.generation] = self
        task = asyncio.ensure_future(self._in_turn())
        try:
            await self._wait(task)
        finally:
            whole = self._conclude(task)
        state = TransferState.DONE if whole else TransferState.FAILED
        if not whole and (self.unheard or self._moving()):
            state = TransferState.IN_DOUBT
        outcome = Outcome(
            request=self.request,
            generation=self.generation,
            state=state,
            blocks=self.blocks(whole),
            nbytes=len(self.ids) * endpoint.regions.block_nbytes,
            seconds=perf_counter() - started,
            reason="" if whole else self.reason,
        )
        endpoint.count(outcome)
        return outcome

    async def _in_turn(self) -> None:
        async with self.session.endpoint.transfers:
            if not self.session.connected:
                raise TransferError(self.request, "the peer is gone")
            await self.body()

    async def _wait(self, task: "asyncio.Future[None]") -> None:
        """Until the task is done, the deadline has passed, or the peer has been gone for a while.

        A peer's end shows first on one of two ways, this one or the engine's; the engine may still
        say that nothing moves any more.
        """
        end = perf_counter() + self.seconds
        lost = asyncio.ensure_future(self.session.gone.wait())
        try:
            waits: set[asyncio.Future[Any]] = {task, lost}
            await asyncio.wait(waits, timeout=self.seconds, return_when=FIRST_COMPLETED)
            if not task.done():
                left = min(_GRACE, end - perf_counter())
                await asyncio.wait({task}, timeout=max(0.0, left))
        finally:
            lost.cancel()

    def blocks(self, whole: bool) -> tuple[int, ...]:
        """What the outcome gives the caller."""
        raise NotImplementedError

    def over(self, whole: bool) -> None:
        """Nothing moves any more."""
        raise NotImplementedError

    def _moving(self) -> "list[asyncio.Future[bool]]":
        return [flight.settled for flight in self.flights if not flight.settled.done()]

    def _conclude(self, task: "asyncio.Future[None]") -> bool:
        for flight in self.flights:
            flight.drop("not begun")
        whole = False
        if not task.done():
            task.cancel()
            gone = not self.session.connected
            self.reason = "the peer is gone" if gone else f"not done within {self.seconds:g} s"
        elif task.cancelled():
            self.reason = "cancelled"
        elif isinstance(error := task.exception(), FastKVError):
            self.reason = error.reason if isinstance(error, TransferError) else str(error)
        elif error is not None:
            self._end(False)
            raise error
        else:
            whole = True
        self._end(whole)
        return whole

    def _end(self, whole: bool) -> None:
        session, moving = self.session, self._moving()
        session.attempts.pop(self.generation, None)
        if not moving:
            if not whole and self.announced:
                session.send("abandon", self.generation, settled=True)
            self.over(whole)
            return
        session.endpoint.ledger.quarantine(self.ids)
        session.send("abandon", self.generation, settled=False)
        session.endpoint.spawn(self._settle(moving))

    async def _settle(self, moving: "list[asyncio.Future[bool]]") -> None:
        await asyncio.wait(moving)
        self.session.endpoint.ledger.settle(self.ids)
        self.session.send("abandon", self.generation, settled=True)
        self.over(False)


class Push(Attempt):
    """Write blocks of this cache to blocks that the peer chooses."""

    def __init__(self, session: "Session", request: str, blocks: Any, seconds: float) -> None:
        super().__init__(session, request, seconds)
        ids = session.endpoint.regions.check_ids("Session.push", "blocks", blocks)
        session.endpoint.ledger.hold(ids)
        self.ids = ids

    async def body(self) -> None:
        """Offer, write, tell the checksums, hear the verdict."""
        session, count = self.session, len(self.ids)
        self.announced = True
        fields = {"request": self.request, "count": count, "seconds": float(self.seconds)}
        session.send("offer", self.generation, **fields)
        ready = await self.reply("ready")
        theirs = ready.array("<u4", count)
        theirs = check_ids("transfer", "the peer's blocks", theirs, session.num_blocks)
        parts = self.launch(True, theirs)
        for part, flight in zip(parts, self.flights, strict=True):
            payload = bytes(len(self.ids[part]))
            if session.checksums:
                payload = (await session.endpoint.hash(self.ids[part])).astype("<u8").tobytes()
            await self.landed(flight)
            session.send("part", self.generation, payload, request=self.request, first=part.start)
        self.unheard = True
        verdict = await self.reply("verified")
        self.unheard = self.announced = False
        if verdict.fields["reason"]:
            raise TransferError(self.request, f"the peer refuses: {verdict.fields['reason']}")
        session.endpoint.counters.blocks_sent += count
        session.endpoint.counters.bytes_sent += count * session.endpoint.regions.block_nbytes

    def blocks(self, whole: bool) -> tuple[int, ...]:
        """The source."""
        return tuple(self.ids.tolist())

    def over(self, whole: bool) -> None:
        """The source is its owner's alone again."""
        self.session.endpoint.ledger.release(self.ids)


class Pull(Attempt):
    """Read blocks that the peer offers under a name into free blocks of this cache."""

    async def body(self) -> None:
        """Ask, read, verify, publish."""
        session, endpoint = self.session, self.session.endpoint
        self.announced = True
        fields = {"request": self.request, "seconds": float(self.seconds)}
        session.send("ask", self.generation, **fields)
        source = await self.reply("source")
        each = 12 if session.checksums else 4
        count = len(source.payload) // each
        if not 0 < count <= endpoint.ledger.num_blocks or len(source.payload) != count * each:
            raise MalformedError("transfer", f"{len(source.payload)} bytes of blocks")
        theirs = np.frombuffer(source.payload, "<u4", count)
        theirs = check_ids("transfer", "the peer's blocks", theirs, session.num_blocks)
        sums = np.frombuffer(source.payload, "<u8", -1 if session.checksums else 0, count * 4)
        ids = endpoint.ledger.allocate(count)
        endpoint.ledger.hold(ids)
        self.ids = ids
        bad = 0
        for part, flight in zip(self.launch(False, theirs), self.flights, strict=True):
            await self.landed(flight)
            if session.checksums:
                bad += int((await endpoint.hash(self.ids[part]) != sums[part]).sum())
        if bad:
            endpoint.counters.checksum_errors += bad
            raise TransferError(self.request, f"{bad} of {count} blocks came with other bytes")
        self.announced = False
        session.send("taken", self.generation)
        endpoint.published(count)

    def blocks(self, whole: bool) -> tuple[int, ...]:
        """The published blocks."""
        return tuple(self.ids.tolist()) if whole else ()

    def over(self, whole: bool) -> None:
        """The blocks are the caller's, or free."""
        ledger = self.session.endpoint.ledger
        if len(self.ids):
            ledger.release(self.ids)
            if not whole:
                ledger.free(self.ids)
