# SPDX-License-Identifier: Apache-2.0
"""One cache on the network: its memory, its ledger, its engine and its peers."""

import asyncio
from collections import deque
from collections.abc import Coroutine
from dataclasses import asdict
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.errors import ContractError, FastKVError, MalformedError, TransferError
from fastkv.transfer import wire
from fastkv.transfer.engine import Engine, make_engine
from fastkv.transfer.fingerprint import Fingerprint
from fastkv.transfer.ledger import BlockState, Ledger
from fastkv.transfer.mover import Mover
from fastkv.transfer.outcome import Counters, Outcome, Received, Stats, TransferState
from fastkv.transfer.regions import Ids, Regions
from fastkv.transfer.session import Session, peer_name
from fastkv.transfer.xxh3 import checksums as checksums_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Requests that were received and nobody has asked for, and peers that nobody has accepted.
_MAX_WAITING = 1024


class Endpoint:
    """A cache that peers can push blocks to and pull blocks from; use it with `async with`.

    Anyone who reaches its port and its engine can read and write the cache's memory: it is for
    trusted networks alone.

    Args:
        regions: the cache's memory. Use each block only as `ledger` allows.
        fingerprint: what the cache is; a peer must have an equal one.
        engine: the engine's name, `nixl`, or an engine.
        checksums: verify every block. Off only where both sides have it off.
        part_bytes: bytes of blocks that the engine gets at a time.
        in_flight: parts that the engine has at a time; with `part_bytes` the bound of bytes.
        max_transfers: transfers begun here at a time; further ones wait, within their deadline.
        linger: seconds that blocks stay quarantined after the peer that may touch them is gone.

    Attributes:
        ledger: who may use which block.
        port: of the control channel, once `listen` has returned.
        refusals: why the last few connections were refused: another cache, no hello, …
    """

    def __init__(
        self,
        regions: Regions,
        fingerprint: Fingerprint,
        *,
        engine: str | Engine = "nixl",
        checksums: bool = True,
        part_bytes: int = 16 << 20,
        in_flight: int = 4,
        max_transfers: int = 64,
        linger: float = 5.0,
    ) -> None:
        bounds = {"part_bytes": part_bytes, "in_flight": in_flight, "max_transfers": max_transfers}
        for name, value in bounds.items():
            if value < 1:
                raise ContractError("Endpoint", name, expected="at least 1", got=str(value))
        self.regions = regions
        self.fingerprint = fingerprint
        self.checksums = checksums
        self.part_bytes = part_bytes
        self.linger = linger
        self.ledger = Ledger(regions.num_blocks)
        self.counters = Counters()
        self.offers: dict[str, NDArray[np.int64]] = {}
        self.port = 0
        self.refusals: deque[FastKVError] = deque(maxlen=16)
        self._engine = make_engine(engine, "Endpoint") if isinstance(engine, str) else engine
        self._bounds = (in_flight, max_transfers)
        self._generations = count(1)
        self._sessions: set[Session] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._received: dict[str, Received] = {}
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "Endpoint":
        self.mover = Mover(self._engine, self._bounds[0])
        self.transfers = asyncio.Semaphore(self._bounds[1])
        self._news = asyncio.Condition()
        self._accepted: asyncio.Queue[Session] = asyncio.Queue(_MAX_WAITING)
        await self.mover.call(self._engine.register, self.regions.extents())
        self._address = await self.mover.call(self._engine.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def listen(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Take peers' connections; returns the port, one that is free for port 0."""
        self._server = await asyncio.start_server(self._welcome, host, port)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self.port

    async def connect(self, host: str, port: int, *, seconds: float = 10.0) -> Session:
        """A session with the peer that listens there.

        Raises:
            FingerprintError: its cache is another; names the fields.
            MalformedError: it is no such peer.
            TransferError: nobody answers within `seconds`.
        """
        op = "Endpoint.connect"
        try:
            streams = await asyncio.wait_for(asyncio.open_connection(host, port), seconds)
        except (OSError, asyncio.TimeoutError) as error:
            raise TransferError(
                op, f"{host}:{port}: {str(error) or type(error).__name__}"
            ) from error
        return await self._meet(op, streams, seconds)

    async def accept(self, *, seconds: float | None = None) -> Session:
        """The next peer that has connected.

        Raises:
            TransferError: nobody within `seconds`.
        """
        try:
            return await asyncio.wait_for(self._next_accepted(), seconds)
        except asyncio.TimeoutError as error:
            raise TransferError("Endpoint.accept", f"nobody within {seconds:g} s") from error

    async def receive(self, request: str, *, seconds: float | None = None) -> Received:
        """Blocks that a peer has pushed under a name, once they are verified.

        They are the caller's, who frees them in `ledger`.

        Raises:
            TransferError: not within `seconds`.
        """
        try:
            return await asyncio.wait_for(self._wait_for(request), seconds)
        except asyncio.TimeoutError as error:
            reason = f"{request!r} not within {seconds:g} s"
            raise TransferError("Endpoint.receive", reason) from error

    def offer(self, request: str, blocks: Ids) -> None:
        """Let peers pull blocks under a name, until `withdraw`.

        Raises:
            BlockIdError: an id that is outside, comes twice or is not in use.
        """
        ids = self.regions.check_ids("Endpoint.offer", "blocks", blocks)
        self.ledger.hold(ids)
        self.withdraw(request)
        self.offers[request] = ids

    def withdraw(self, request: str) -> None:
        """End an offer; a pull that is under way keeps its blocks until it settles."""
        ids = self.offers.pop(request, None)
        if ids is not None:
            self.ledger.release(ids)

    async def quiet(self, *, seconds: float) -> bool:
        """Wait until no block is quarantined; False if that takes longer than `seconds`."""
        end = perf_counter() + seconds
        while self.ledger.count(BlockState.QUARANTINED):
            if perf_counter() > end:
                return False
            await asyncio.sleep(0.005)
        return True

    def stats(self) -> Stats:
        """Counters, timings and blocks at this moment."""
        states = {
            "free": self.ledger.count(BlockState.FREE),
            "in_use": self.ledger.count(BlockState.IN_USE),
            "quarantined": self.ledger.count(BlockState.QUARANTINED),
        }
        return Stats(**asdict(self.counters), **states)

    async def close(self) -> None:
        """Leave all peers and the engine. Memory may be freed when it returns."""
        if self._server is not None:
            self._server.close()
        for session in tuple(self._sessions):
            await session.close()
        await self.mover.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What sessions and transfers ask of their endpoint.

    def next_generation(self) -> int:
        """A number that no other attempt of this endpoint has."""
        return next(self._generations)

    def spawn(self, work: "Coroutine[Any, Any, None]") -> "asyncio.Task[None]":
        """Run something beside the caller until the endpoint closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def hash(self, ids: "NDArray[np.int64]") -> "NDArray[np.uint64]":
        """Checksums of blocks, made in a thread."""
        started = perf_counter()
        sums = await asyncio.to_thread(checksums_of, self.regions, ids)
        self.counters.seconds_hashing += perf_counter() - started
        return sums

    def why_not(self, request: str, session: Session, generation: int) -> str:
        """Why a push of this name is refused; empty if it is not.

        A newer attempt takes the place of an older one, whose blocks stay quarantined until it has
        settled.
        """
        if request in self._received:
            return "a request of this name waits to be received already"
        if len(self._received) >= _MAX_WAITING:
            return f"{_MAX_WAITING} requests wait to be received already"
        if generation in session.inbound:
            return "this generation is under way already"
        for other in self._sessions:
            for held in other.inbound.values():
                if held.request == request:
                    if other is session and held.generation > generation:
                        return "a newer generation is under way"
                    held.suspect()
        return ""

    def publish(self, request: str, ids: "NDArray[np.int64]") -> bool:
        """Give verified blocks to whoever receives the request; False if the name is taken."""
        if request in self._received:
            return False
        self._received[request] = Received(request, tuple(ids.tolist()))
        self.published(len(ids))
        self.spawn(self._notify())
        return True

    def count(self, outcome: Outcome) -> None:
        """Add a transfer that was begun here to the counters."""
        counters = self.counters
        if outcome.state is TransferState.DONE:
            counters.done += 1
            counters.seconds += outcome.seconds
        elif outcome.state is TransferState.FAILED:
            counters.failed += 1
        else:
            counters.in_doubt += 1

    def lost(self, session: Session) -> None:
        """A session has ended."""
        self._sessions.discard(session)

    def published(self, blocks: int) -> None:
        """Count blocks that were verified and given to a caller here."""
        self.counters.blocks_published += blocks
        self.counters.bytes_published += blocks * self.regions.block_nbytes

    async def _wait_for(self, request: str) -> Received:
        async with self._news:
            await self._news.wait_for(lambda: request in self._received)
            return self._received.pop(request)

    async def _next_accepted(self) -> Session:
        while not (session := await self._accepted.get()).connected:
            pass
        return session

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    def _hello(self) -> wire.Hello:
        memory = [(region.address, region.stride) for region in self.regions.regions]
        return wire.Hello(
            fingerprint=self.fingerprint,
            engine=self._engine.name,
            checksums=self.checksums,
            num_blocks=self.regions.num_blocks,
            memory=np.array(memory, np.int64),
            address=self._address,
        )

    async def _welcome(self, *streams: Any) -> None:
        # A stranger's bytes end its own connection and nothing else.
        try:
            session = await self._meet("Endpoint.accept", streams, 10.0)
        except FastKVError as error:
            self.refusals.append(error)
            return
        if self._accepted.full():
            session.lose("nobody accepts")
        else:
            self._accepted.put_nowait(session)

    async def _meet(self, op: str, streams: Any, seconds: float) -> Session:
        """Exchange hellos and compare, before the engine hears of the peer."""
        reader, writer = streams
        try:
            return await asyncio.wait_for(self._exchange(op, reader, writer), seconds)
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            writer.close()
            reason = f"{peer_name(writer)}: no hello ({type(error).__name__})"
            raise TransferError(op, reason) from error
        except BaseException:  # a connection that is not a session's has no other owner
            writer.close()
            raise

    async def _exchange(
        self, op: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Session:
        writer.write(self._hello().frame())
        await writer.drain()
        hello = wire.parse_hello(*await wire.read_frame(reader))
        self.fingerprint.require_equal(hello.fingerprint, op)
        if hello.engine != self._engine.name:
            reason = f"the peer's engine is {hello.engine[:40]!r}, this side's {self._engine.name}"
            raise TransferError(op, reason)
        hello.regions(self.regions)
        peer = await self.mover.call(self._engine.connect, hello.address)
        # Both are ready when both have said so: a transfer then finds the engine connected.
        writer.write(wire.READY)
        await writer.drain()
        if (await wire.read_frame(reader))[0] != wire.READY_HEADER:
            raise MalformedError(op, "no word of being ready")
        session = Session(self, (reader, writer), hello, peer)
        self._sessions.add(session)
        return session
