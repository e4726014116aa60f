# SPDX-License-Identifier: Apache-2.0
"""The side that did not begin a transfer: takes in what a peer pushes, lends what it pulls."""

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from fastkv.errors import FastKVError, MalformedError
from fastkv.transfer.wire import Message

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastkv.transfer.session import Session

# This side's clock starts later than the peer's and must not end first without need.
_SLACK = 0.25


class Held:
    """Blocks here that a peer's transfer may touch, until it says that it has settled.

    Attributes:
        doubt: the deadline has passed, or the peer was lost: the blocks are quarantined.
    """

    def __init__(
        self, session: "Session", request: str, ids: "NDArray[np.int64]", seconds: float
    ) -> None:
        self.session = session
        self.request = request
        self.ids = ids
        self.doubt = False
        self.over = False
        session.endpoint.ledger.hold(ids)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds + _SLACK, self.late)

    def late(self) -> None:
        """The deadline has passed here."""
        if not (self.doubt or self.over):
            self.session.endpoint.counters.late += 1
            self.suspect()

    def suspect(self) -> None:
        """Quarantine the blocks."""
        if not (self.doubt or self.over):
            self.doubt = True
            self.session.endpoint.ledger.quarantine(self.ids)

    def end(self) -> None:
        """Nothing touches the blocks any more."""
        if self.over:
            return
        self.over = True
        self._timer.cancel()
        ledger = self.session.endpoint.ledger
        if self.doubt:
            ledger.settle(self.ids)
        ledger.release(self.ids)


class Inbound(Held):
    """A push from the peer: blocks that wait for their bytes, and then for their checksums."""

    def __init__(
        self, session: "Session", message: Message, ids: "NDArray[np.int64]", seconds: float
    ) -> None:
        super().__init__(session, message.fields["request"], ids, seconds)
        self.generation = message.generation
        self.arrived = 0
        self.bad = 0
        self._tail: asyncio.Task[None] | None = None

    def part(self, message: Message) -> None:
        """Some blocks have arrived; the next ones in order.

        Raises:
            MalformedError: other blocks than the next.
        """
        first = message.fields["first"]
        size = 8 if self.session.checksums else 1
        count = len(message.payload) // size
        if first != self.arrived or not 0 < count <= len(self.ids) - first:
            raise MalformedError("transfer", f"part {first} + {count} of {len(self.ids)} blocks")
        sums = message.array("<u8" if self.session.checksums else "u1", count)
        self.arrived += count
        self._tail = self.session.endpoint.spawn(self._verify(self._tail, first, sums))

    async def _verify(
        self, before: "asyncio.Task[None] | None", first: int, sums: "NDArray[np.uint64]"
    ) -> None:
        if before is not None:
            await before
        ids = self.ids[first : first + len(sums)]
        if self.session.checksums:
            self.bad += int((await self.session.endpoint.hash(ids) != sums).sum())
        if first + len(sums) == len(self.ids):
            self._finish()

    def _finish(self) -> None:
        """Every part has arrived, so the peer's engine is done with these blocks."""
        endpoint, late = self.session.endpoint, self.doubt
        self.session.inbound.pop(self.generation, None)
        already_over = self.over
        self.end()
        reason = ""
        if self.bad:
            endpoint.counters.checksum_errors += self.bad
            reason = f"{self.bad} of {len(self.ids)} blocks arrived with other bytes"
        elif late or already_over:
            reason = "it arrived after its deadline"
        elif not endpoint.publish(self.request, self.ids):
            reason = "a request of this name waits to be received already"
        if reason and not already_over:
            endpoint.ledger.free(self.ids)
        self.session.send("verified", self.generation, reason=reason)

    def discard(self) -> None:
        """The transfer has settled without being whole."""
        if not self.over:
            self.end()
            self.session.endpoint.ledger.free(self.ids)


def take_in(session: "Session", message: Message) -> None:
    """Answer an offer: blocks for it, or why not."""
    endpoint, count = session.endpoint, message.fields["count"]
    request = message.fields["request"]
    reason = endpoint.why_not(request, session, message.generation)
    if not reason and not 0 < count <= endpoint.ledger.num_blocks:
        reason = f"{count} blocks, this cache has {endpoint.ledger.num_blocks}"
    ids = np.empty(0, np.int64)
    if not reason:
        try:
            ids = endpoint.ledger.allocate(count)
        except FastKVError as error:
            reason = str(error)
    if reason:
        endpoint.counters.refused += 1
        session.send("refused", message.generation, reason=reason[:500])
        return
    session.inbound[message.generation] = Inbound(session, message, ids, message.fields["seconds"])
    session.send("ready", message.generation, ids.astype("<u4").tobytes())


async def lend(session: "Session", message: Message) -> None:
    """Answer an ask: the blocks of a request that was offered here, held until it settles."""
    endpoint = session.endpoint
    blocks = endpoint.offers.get(message.fields["request"])
    reason = "no request of this name is offered" if blocks is None else ""
    if message.generation in session.lent:
        reason = "this generation is under way already"
    if not reason and blocks is not None:
        try:
            held = Held(session, message.fields["request"], blocks, message.fields["seconds"])
        except FastKVError as error:
            reason = str(error)
        else:
            session.lent[message.generation] = held
            sums = await endpoint.hash(blocks) if session.checksums else np.empty(0, np.uint64)
            if not held.over:
                payload = blocks.astype("<u4").tobytes() + sums.astype("<u8").tobytes()
                session.send("source", message.generation, payload)
            return
    endpoint.counters.refused += 1
    session.send("refused", message.generation, reason=reason[:500])
