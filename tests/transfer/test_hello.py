# SPDX-License-Identifier: Apache-2.0
"""The first bytes of a connection: refused before the engine hears of the peer, or accepted."""

import asyncio
import json
import struct
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastkv.errors import ContractError, FingerprintError, MalformedError, TransferError
from fastkv.transfer import Endpoint, Fingerprint, Regions, TransferState, wire
from helpers.steered_engine import SteeredEngine
from helpers.transfer import block_bytes, random_caches, spec_of

SPEC = spec_of(["block_wise_fp8", "none"])
PRINT = Fingerprint.of(SPEC, model="m")


class Watched(SteeredEngine):
    connections = 0

    def connect(self, address):
        self.connections += 1
        return super().connect(address)


def endpoint(fingerprint=PRINT, seed=1, engine=None, **options):
    regions = Regions(SPEC, random_caches(SPEC, 8, seed))
    return Endpoint(regions, fingerprint, engine=engine or Watched(), **options)


@asynccontextmanager
async def listening(**options):
    async with endpoint(**options) as found:
        await found.listen()
        yield found


async def still_serves(node):
    """A good peer gets through after whatever came before."""
    async with endpoint(seed=2) as other:
        session = await other.connect("127.0.0.1", node.port)
        blocks = other.ledger.allocate(2)
        outcome = await session.push("after", blocks, seconds=5)
        assert outcome.state is TransferState.DONE, outcome.reason
        received = await node.receive("after", seconds=1)
        node.ledger.free(received.blocks)
    assert set(map(node.ledger.state, range(8))) == {"free"}


async def say(port, data, end=True):
    """Send bytes as a stranger; returns what comes back until the other side hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    if end:
        writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 5)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def hello(**changes):
    """A hello's frame with some of its header changed."""
    good = wire.Hello(PRINT, "steered", True, 8, np.ones((6, 2), np.int64), b"engine 0").frame()
    _, size = struct.unpack_from("<IH", good)
    header = {**json.loads(good[6 : 6 + size]), **changes}
    return wire._frame(header, good[6 + size :])


GARBAGE = [
    b"",
    b"\x00",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\xff" * 64,
    struct.pack("<IH", 1 << 31, 10) + b"x" * 100,
    struct.pack("<IH", 10, 0) + b"x" * 10,
    struct.pack("<IH", 4, 10) + b"x" * 10,
    struct.pack("<IH", 2, 2) + b"[]",
    struct.pack("<IH", 4000, 4000) + b"[" * 4000,
    hello()[:-1],
    hello()[:20],
    hello(magic="other"),
    hello(protocol=2),
    hello(num_blocks=0),
    hello(num_blocks=1 << 40),
    hello(num_blocks="8"),
    hello(sizes=[1, 2, 3]),
    hello(sizes=[-1, 96, 8]),
    hello(sizes=None),
    hello(checksums=1),
    hello(engine=None),
    hello(engine="nixl"),
    hello(),  # its strides are no pages
]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_ends_its_own_connection_and_nothing_else(data):
    async def run():
        async with listening() as node:
            await say(node.port, data)
            assert node._engine.connections == 0
            await still_serves(node)

    asyncio.run(run())


@given(st.binary(max_size=300))
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_random_bytes(data):
    async def run():
        async with listening() as node:
            await say(node.port, hello()[: len(data)] + data)
            assert node._engine.connections == 0

    asyncio.run(run())


CHANGES = {
    "model": "n",
    "page_size": 8,
    "formats": ("none", "none"),
    "scale_dtype": "float16",
    "scales_digest": "0" * 32,
    "shard_rank": 1,
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_cache_is_refused_by_name_on_both_sides(name):
    async def run():
        async with listening() as node, endpoint(replace(PRINT, **{name: CHANGES[name]})) as other:
            with pytest.raises(FingerprintError, match=f"differs in {name}: ours"):
                await other.connect("127.0.0.1", node.port)
            while not node.refusals:
                await asyncio.sleep(0.005)
            (refusal,) = node.refusals
            assert refusal.op == "Endpoint.accept"
            assert [found for found, _, _ in refusal.differences] == [name]
            assert node._engine.connections == other._engine.connections == 0
            await still_serves(node)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_nobody_there():
    async def run():
        async with endpoint() as node:
            with pytest.raises(TransferError, match=r"Endpoint\.connect: 127\.0\.0\.1:1: "):
                await node.connect("127.0.0.1", 1)
            with pytest.raises(TransferError, match=r"Endpoint\.accept: nobody within 0\.05 s"):
                await node.accept(seconds=0.05)

    asyncio.run(run())


def test_a_silent_server_costs_no_more_than_the_deadline():
    async def run():
        async def wait(reader, writer):
            await reader.read()  # until the other side hangs up
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(wait, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with endpoint() as node:
            with pytest.raises(TransferError, match="no hello"):
                await asyncio.wait_for(node.connect("127.0.0.1", port, seconds=0.2), 2)
        await asyncio.sleep(0.05)
        server.close()

    asyncio.run(run())


async def peer_that_says(node, *frames):
    """A peer with a good hello that then says something of its own."""
    async with endpoint(seed=3) as other:
        reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
        writer.write(other._hello().frame() + wire.READY + b"".join(frames))
        await asyncio.sleep(0.1)  # a peer that hangs up gets no answer any more
        writer.write_eof()
        data = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        return data


def message(kind, payload=b"", generation=1, **fields):
    return wire.encode(wire.Message(kind, generation, fields, payload))


OFFER = message("offer", request="r", count=2, seconds=0.05)
BAD = [
    (message("part", bytes(16), request="r", first=1), "part 1"),
    (message("part", bytes(16), request="other", first=0), "of another request"),
    (message("part", bytes(15), request="r", first=0), "15 bytes in part"),
    (message("part", bytes(24), request="r", first=0), "part 0"),
    (message("part", b"", request="r", first=0), "part 0"),
    (message("offer", request="r", count=2, seconds=-1.0), "a value that seconds of offer"),
    (message("offer", request=7, count=2, seconds=1.0), "a value that request of offer"),
    (message("offer", request="r", count=2), "no message: 'offer'"),
    (message("abandon", settled=1), "a value that settled of abandon"),
    (message("no such kind"), "no message: 'no such kind'"),
    (message("taken", generation=-1), "no message: 'taken'"),
]


@pytest.mark.parametrize(("frame", "says"), BAD, ids=range(len(BAD)))
def test_a_peer_that_talks_nonsense_is_left_and_its_blocks_come_back(frame, says):
    async def run():
        async with listening(linger=0.05) as node:
            await peer_that_says(node, OFFER, frame)
            session = node._accepted.get_nowait()
            while session.connected:
                await asyncio.sleep(0.005)
            assert says in session.reason
            while node.ledger.count("free") < 8:
                await asyncio.sleep(0.005)
            assert node.stats().blocks_published == 0
            await still_serves(node)

    asyncio.run(asyncio.wait_for(run(), 10))


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (message("offer", request="r", count=9, seconds=1), b"9 blocks, this cache has 8"),
        (message("offer", request="r", count=0, seconds=1), b"0 blocks, this cache has 8"),
        (OFFER + OFFER, b"this generation is under way already"),
        (message("ask", request="r", seconds=1), b"no request of this name is offered"),
    ],
)
def test_a_legal_word_out_of_place_is_refused(frame, says):
    async def run():
        async with listening(linger=0.05) as node:
            assert says in await peer_that_says(node, frame)
            assert node.stats().refused == 1

    asyncio.run(run())


def test_words_about_nothing_are_no_fault():
    async def run():
        async with listening() as node:
            frames = [
                message("taken", generation=5),
                message("abandon", generation=6, settled=False),
                message("verified", generation=7, reason=""),
                message("part", bytes(8), generation=8, request="r", first=0),
                message("ask", request="r", seconds=1),
            ]
            assert b"refused" in await peer_that_says(node, *frames)
            assert node.stats().late == 1

    asyncio.run(run())


@pytest.mark.parametrize("name", ["part_bytes", "in_flight", "max_transfers"])
def test_bounds_are_at_least_one(name):
    with pytest.raises(ContractError, match=f"Endpoint: {name}: expected at least 1, got 0"):
        endpoint(**{name: 0})


@pytest.mark.parametrize(("request_", "seconds"), [("", 1), ("r" * 257, 1), ("r", 0), ("r", -1)])
def test_requests_and_deadlines_that_cannot_be(request_, seconds):
    async def run():
        async with listening() as node, endpoint(seed=2) as other:
            session = await other.connect("127.0.0.1", node.port)
            blocks = other.ledger.allocate(1)
            with pytest.raises(ContractError, match=r"Session\.push: (request|seconds): expected"):
                await session.push(request_, blocks, seconds=seconds)
            with pytest.raises(ContractError, match=r"Session\.pull: (request|seconds): expected"):
                await session.pull(request_, seconds=seconds)
            other.ledger.free(blocks)
            assert other.ledger.count("free") == 8

    asyncio.run(run())


def test_without_checksums_bytes_move_alike():
    async def run():
        async with listening(checksums=False) as node, endpoint(seed=4, checksums=False) as other:
            session = await other.connect("127.0.0.1", node.port)
            blocks = other.ledger.allocate(4)[::-1]
            outcome = await session.push("r", blocks, seconds=5)
            assert (outcome.state, outcome.reason) == ("done", "")
            received = (await node.receive("r", seconds=1)).blocks
            sent = [block_bytes(other.regions._caches, i) for i in blocks]
            assert [block_bytes(node.regions._caches, i) for i in received] == sent
            node.offer("back", received)
            pulled = await session.pull("back", seconds=5)
            assert (pulled.state, pulled.reason) == ("done", "")
            assert [block_bytes(other.regions._caches, i) for i in pulled.blocks] == sent
            assert node.stats().seconds_hashing == other.stats().seconds_hashing == 0

    asyncio.run(run())


def test_checksums_are_on_if_one_side_asks_for_them():
    async def run():
        async with listening(checksums=False) as node, endpoint(seed=4) as other:
            session = await other.connect("127.0.0.1", node.port)
            assert session.checksums is True
            assert (await node.accept(seconds=1)).checksums is True

    asyncio.run(run())


def test_malformed_is_what_the_connecting_side_raises():
    async def run():
        async def other(reader, writer):
            writer.write(hello(magic="x"))
            await reader.read()
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(other, "127.0.0.1", 0)
        async with endpoint() as node:
            with pytest.raises(MalformedError, match="does not speak this protocol"):
                await node.connect("127.0.0.1", server.sockets[0].getsockname()[1])
        await asyncio.sleep(0.05)
        server.close()

    asyncio.run(run())
