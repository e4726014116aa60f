# SPDX-License-Identifier: Apache-2.0
"""One peer: the control channel, and the transfers that both sides begin on it."""

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastkv.errors import ContractError, FastKVError, MalformedError, TransferError
from fastkv.transfer import incoming, wire
from fastkv.transfer.outgoing import Attempt, Pull, Push

if TYPE_CHECKING:
    from fastkv.transfer.endpoint import Endpoint
    from fastkv.transfer.outcome import Outcome
    from fastkv.transfer.regions import Ids

# Words that a peer does not read pile up here; past this it counts as gone.
_MAX_UNSENT = 64 << 20


class Session:
    """A connection to one peer; `Endpoint.connect` and `Endpoint.accept` make them.

    Attributes:
        name: the peer's address, as in `10.0.0.2:7301`.
        num_blocks: blocks of the peer's cache.
        gone: set once the peer cannot be spoken to any more.
        reason: why not.
    """

    def __init__(
        self,
        endpoint: "Endpoint",
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        hello: wire.Hello,
        peer: Any,
    ) -> None:
        self.endpoint = endpoint
        self._reader, self._writer = streams
        self.name = peer_name(self._writer)
        self.num_blocks = hello.num_blocks
        self.regions = hello.regions(endpoint.regions)
        self.checksums = hello.checksums or endpoint.checksums
        self.peer = peer
        self.attempts: dict[int, Attempt] = {}
        self.inbound: dict[int, incoming.Inbound] = {}
        self.lent: dict[int, incoming.Held] = {}
        self.gone = asyncio.Event()
        self.reason = ""
        endpoint.spawn(self._listen())

    @property
    def connected(self) -> bool:
        """Whether the peer can still be spoken to."""
        return not self.gone.is_set()

    async def push(self, request: str, blocks: "Ids", *, seconds: float = 30.0) -> "Outcome":
        """Move blocks of this cache into the peer's; the peer gets them from `receive`.

        Cancelling it is as if the deadline had passed.

        Args:
            request: a name of at most 256 characters, new to the peer.
            blocks: ids of blocks that are in use; they stay the caller's, and must not be written
                before this returns, nor while they are quarantined.
            seconds: the deadline, counted from here.

        Returns:
            The outcome; what goes wrong on the way is in it and not raised.

        Raises:
            BlockIdError: an id that is outside, comes twice or is not in use.
            ContractError: a name or a deadline that cannot be.
        """
        _check("Session.push", request, seconds)
        return await Push(self, request, blocks, seconds).run()

    async def pull(self, request: str, *, seconds: float = 30.0) -> "Outcome":
        """Move the blocks that the peer offers under a name into free blocks of this cache.

        Args:
            request: the name that the peer gave to `Endpoint.offer`.
            seconds: the deadline, counted from here.

        Returns:
            The outcome; its blocks are the caller's if it is DONE.

        Raises:
            ContractError: a name or a deadline that cannot be.
        """
        _check("Session.pull", request, seconds)
        return await Pull(self, request, seconds).run()

    async def close(self) -> None:
        """End the connection. What is under way ends FAILED, or IN_DOUBT until it settles."""
        self.lose("closed here")
        with suppress(OSError):
            await self._writer.wait_closed()

    def send(self, kind: str, generation: int, payload: bytes = b"", /, **fields: Any) -> None:
        """Queue a message; none is sent to a peer that is gone."""
        if not self.connected:
            return
        self._writer.write(wire.encode(wire.Message(kind, generation, fields, payload)))
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT:
            self.lose("the peer does not read")

    async def _listen(self) -> None:
        reason = "the peer is gone"
        try:
            while self.connected:
                self._handle(wire.parse(*await wire.read_frame(self._reader)))
        except (OSError, EOFError):
            pass
        except FastKVError as error:
            reason = str(error)
        self.lose(reason)

    def _handle(self, message: wire.Message) -> None:
        if message.kind == "offer":
            incoming.take_in(self, message)
        elif message.kind == "ask":
            self.endpoint.spawn(incoming.lend(self, message))
        elif message.kind == "part":
            self._part(message)
        elif message.kind in {"taken", "abandon"}:
            self._over(message)
        elif message.generation in self.attempts:
            self.attempts[message.generation].hear(message)
        # Else it is the peer's word on an attempt that has ended here.

    def _part(self, message: wire.Message) -> None:
        inbound = self.inbound.get(message.generation)
        if inbound is None:
            self.endpoint.counters.late += 1
        elif inbound.request != message.fields["request"]:
            raise MalformedError("transfer", "a part of another request than its generation's")
        else:
            inbound.part(message)

    def _over(self, message: wire.Message) -> None:
        if message.fields.get("settled", True):
            held = self.lent.pop(message.generation, None)
            if held is not None:
                held.end()
            inbound = self.inbound.pop(message.generation, None)
            if inbound is not None:
                inbound.discard()
            return
        for found in (self.lent, self.inbound):
            if message.generation in found:
                found[message.generation].suspect()

    def lose(self, reason: str) -> None:
        """The peer cannot be spoken to any more; its blocks come back after a while."""
        if not self.connected:
            return
        self.gone.set()
        self.reason = reason
        self._writer.close()
        for attempt in tuple(self.attempts.values()):
            attempt.hear(None)
        for held in (*self.lent.values(), *self.inbound.values()):
            held.suspect()
        self.endpoint.lost(self)
        self.endpoint.spawn(self._bury())

    async def _bury(self) -> None:
        """After `linger` seconds nothing of a peer that is gone is still on its way."""
        await asyncio.sleep(self.endpoint.linger)
        self.endpoint.mover.forget(self.peer)
        for held in self.lent.values():
            held.end()
        for inbound in tuple(self.inbound.values()):
            inbound.discard()
        self.lent.clear()
        self.inbound.clear()
        with suppress(TransferError):
            await self.endpoint.mover.disconnect(self.peer)


def peer_name(writer: asyncio.StreamWriter) -> str:
    """The peer's address as text."""
    host, port, *_ = writer.get_extra_info("peername") or ("?", 0)
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def _check(op: str, request: str, seconds: float) -> None:
    if not 0 < len(request) <= 256:
        raise ContractError(
            op, "request", expected="a name of 1 to 256 characters", got=repr(request)[:80]
        )
    if not 0 < seconds <= 1e6:
        raise ContractError(op, "seconds", expected="a number above 0", got=repr(seconds))
