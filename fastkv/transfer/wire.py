# SPDX-License-Identifier: Apache-2.0
"""Frames of the control channel: bounded, typed, checked field by field before anyone acts on one.

A frame is `length u32 | header length u16 | header | payload`, little-endian; the header is JSON
with the kind and its fields, the payload an array or bytes. The first frame each way is a hello.
"""

import asyncio
import json
import struct
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastkv.errors import MalformedError
from fastkv.transfer.fingerprint import Fingerprint
from fastkv.transfer.regions import Region, Regions

MAGIC = "fastkv-transfer"
PROTOCOL = 1
#: Bytes of one frame, at most: ids and checksums of 1,000,000 blocks.
MAX_FRAME = 12 << 20
_MAX_HEADER = 4096
_MAX_ADDRESS = 1 << 20
_PREFIX = struct.Struct("<IH")

# Fields of each kind beside `generation`, an attempt's number at the side that began it.
_KINDS: dict[str, dict[str, type]] = {
    # from the side that began the transfer
    "offer": {"request": str, "count": int, "seconds": float},
    "part": {"request": str, "first": int},
    "ask": {"request": str, "seconds": float},
    "taken": {},
    "abandon": {"settled": bool},
    # to it
    "ready": {},
    "source": {},
    "refused": {"reason": str},
    "verified": {"reason": str},  # empty: all is well
}


@dataclass(frozen=True, slots=True)
class Message:
    """One frame after the hello."""

    kind: str
    generation: int
    fields: dict[str, Any]
    payload: bytes = b""

    def array(self, dtype: str, count: int) -> "NDArray[Any]":
        """The payload as `count` little-endian numbers.

        Raises:
            MalformedError: it is not as long as that.
        """
        if len(self.payload) != count * np.dtype(dtype).itemsize:
            reason = f"{len(self.payload)} bytes in {self.kind}, not {count} of {dtype}"
            raise MalformedError("transfer", reason)
        return np.frombuffer(self.payload, dtype)


@dataclass(frozen=True, slots=True)
class Hello:
    """What each side says first.

    Attributes:
        fingerprint: of the cache.
        engine: the engine's name.
        checksums: whether this side asks for checksums; both get them if one does.
        num_blocks: blocks of the cache.
        memory: address and stride of each region, int64 `[R, 2]`.
        address: what the engine's `connect` takes.
    """

    fingerprint: Fingerprint
    engine: str
    checksums: bool
    num_blocks: int
    memory: "NDArray[np.int64]"
    address: bytes

    def frame(self) -> bytes:
        """The frame that says so."""
        print_ = self.fingerprint.encode()
        memory = self.memory.astype("<i8").tobytes()
        header = {
            "magic": MAGIC,
            "protocol": PROTOCOL,
            "engine": self.engine,
            "checksums": self.checksums,
            "num_blocks": self.num_blocks,
            "sizes": [len(print_), len(memory), len(self.address)],
        }
        return _frame(header, print_ + memory + self.address)

    def regions(self, mine: Regions) -> tuple[Region, ...]:
        """The peer's regions: of an equal cache, so names and sizes are this cache's own.

        Raises:
            MalformedError: memory that cannot be such a cache's.
        """
        if self.memory.shape != (len(mine.regions), 2):
            raise MalformedError("hello", f"memory of {len(self.memory)} regions")
        found = tuple(
            Region(ours.name, int(address), ours.nbytes, int(stride))
            for ours, (address, stride) in zip(mine.regions, self.memory, strict=True)
        )
        for region in found:
            end = region.address + region.stride * self.num_blocks
            if region.address <= 0 or region.stride < region.nbytes or end >= 1 << 62:
                raise MalformedError("hello", f"memory that {region.name} cannot have")
        return found


def parse_hello(header: dict[str, Any], payload: bytes) -> Hello:
    """A hello of a frame.

    Raises:
        MalformedError: anything else.
    """
    if header.get("magic") != MAGIC:
        raise MalformedError("hello", "the other side does not speak this protocol")
    if header.get("protocol") != PROTOCOL:
        got = repr(header.get("protocol"))[:40]
        raise MalformedError("hello", f"protocol {got}, this side speaks {PROTOCOL}")
    engine, sums = header.get("engine"), header.get("checksums")
    blocks, sizes = header.get("num_blocks"), header.get("sizes")
    if not (
        isinstance(engine, str)
        and isinstance(sums, bool)
        and type(blocks) is int
        and 0 < blocks < 1 << 31
        and isinstance(sizes, list)
        and len(sizes) == 3
        and all(map(_is_size, sizes))
        and sum(sizes) == len(payload)
        and sizes[1] % 16 == 0
        and sizes[2] <= _MAX_ADDRESS
    ):
        raise MalformedError("hello", "a value that it cannot have")
    second, third = sizes[0], sizes[0] + sizes[1]
    memory = np.frombuffer(payload[second:third], "<i8").reshape(-1, 2)
    print_ = Fingerprint.decode(payload[:second])
    return Hello(print_, engine, sums, blocks, memory, payload[third:])


def encode(message: Message) -> bytes:
    """The frame of a message."""
    header = {"kind": message.kind, "generation": message.generation, **message.fields}
    return _frame(header, message.payload)


def parse(header: dict[str, Any], payload: bytes) -> Message:
    """A message of a frame.

    Raises:
        MalformedError: no known kind, or fields that it does not have.
    """
    kind, generation = header.pop("kind", None), header.pop("generation", None)
    wanted = _KINDS.get(kind) if isinstance(kind, str) else None
    if wanted is None or not _is_size(generation) or header.keys() != wanted.keys():
        raise MalformedError("transfer", f"no message: {repr(kind)[:40]}")
    for name, expected in wanted.items():
        if not _fits(header[name], expected):
            raise MalformedError("transfer", f"a value that {name} of {kind} cannot have")
    return Message(str(kind), generation, header, payload)


async def read_frame(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """Header and payload of the next frame.

    Raises:
        MalformedError: no frame; the stream cannot be read on.
        asyncio.IncompleteReadError, OSError: the other side is gone.
    """
    total, size = _PREFIX.unpack(await reader.readexactly(_PREFIX.size))
    if not (0 < size <= _MAX_HEADER and size <= total <= MAX_FRAME):
        raise MalformedError("transfer", f"a frame of {total} bytes with a header of {size}")
    body = await reader.readexactly(total)
    try:
        header = json.loads(body[:size])
    except (ValueError, RecursionError) as error:
        raise MalformedError("transfer", f"a header that is no JSON ({error!r:.60})") from None
    if not isinstance(header, dict):
        raise MalformedError("transfer", "a header that is no object")
    return header, body[size:]


def _frame(header: dict[str, Any], payload: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return _PREFIX.pack(len(text) + len(payload), len(text)) + text + payload


#: What each side says once it has compared the hellos and knows the peer's engine.
READY_HEADER = {"ready": True}
READY = _frame(READY_HEADER, b"")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _fits(value: Any, expected: type) -> bool:
    if expected is int:
        return _is_size(value)
    if expected is float:
        return type(value) in {int, float} and isfinite(value) and 0 < value <= 1e6
    if expected is str:
        return isinstance(value, str) and len(value) <= 512
    return type(value) is expected
