# SPDX-License-Identifier: Apache-2.0
"""A process with an endpoint, driven by lines of JSON: one command a line, one answer a line.

Its cache lies in a file that the test maps too, so that the test sees every byte, also of a process
that is stopped or dead.
"""

import asyncio
import ctypes
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastkv.errors import FastKVError
from fastkv.transfer import Endpoint, Fingerprint, Progress, Regions
from fastkv.transfer.nixl import NixlEngine
from helpers.transfer import mapped_caches, spec_of


class Flipping(NixlEngine):
    """Flips one bit on the way, in the region of K scales of the first layer."""

    def register(self, extents):
        self.scratch = {start: np.zeros(size, np.uint8) for start, size in extents}
        super().register([*extents, *((a.ctypes.data, a.size) for a in self.scratch.values())])

    def aim(self, region):
        self.target = region

    def post(self, peer, write, local, remote):
        if write:
            local = np.array([self._copy(int(at), int(n)) for at, n in local], np.uint64)
            self._flip(local)
        self.read = None if write else local
        return super().post(peer, write, local, remote)

    def poll(self, handle):
        progress = super().poll(handle)
        if progress is Progress.DONE and self.read is not None:
            self._flip(self.read)
            self.read = None
        return progress

    def _copy(self, at, nbytes):
        start = max(found for found in self.scratch if found <= at)
        own = self.scratch[start].ctypes.data + at - start
        ctypes.memmove(own, at, nbytes)
        self.homes = {**getattr(self, "homes", {}), own: at}
        return own, nbytes

    def _flip(self, runs):
        end = self.target.address + self.target.stride * 10**6
        for at, nbytes in runs.tolist():
            home = getattr(self, "homes", {}).get(at, at)
            if self.target.address <= home < end and nbytes % self.target.nbytes == 0:
                ctypes.cast(at, ctypes.POINTER(ctypes.c_uint8))[nbytes - 1] ^= 1
                return


class Peer:
    def __init__(self, options):
        spec = spec_of(options["quant"], **options["sizes"])
        self.caches = mapped_caches(spec, options["num_blocks"], Path(options["path"]))
        regions = Regions(spec, self.caches)
        fingerprint = Fingerprint.of(spec, model=options["model"])
        engine = "nixl"
        if options["flip"]:
            engine = Flipping()
            engine.aim(regions.regions[2])
        self.endpoint = Endpoint(regions, fingerprint, engine=engine, **options["endpoint"])
        self.sessions = []

    async def connect(self, port, seconds=10.0):
        self.sessions.append(await self.endpoint.connect("127.0.0.1", port, seconds=seconds))
        return len(self.sessions) - 1

    async def accept(self):
        self.sessions.append(await self.endpoint.accept(seconds=20))
        return len(self.sessions) - 1

    async def push(self, session, request, blocks, seconds):
        return asdict(await self.sessions[session].push(request, blocks, seconds=seconds))

    async def pull(self, session, request, seconds):
        return asdict(await self.sessions[session].pull(request, seconds=seconds))

    async def receive(self, request, seconds):
        return asdict(await self.endpoint.receive(request, seconds=seconds))

    async def hang_up(self, session):
        await self.sessions[session].close()

    async def offer(self, request, blocks):
        self.endpoint.offer(request, blocks)

    async def withdraw(self, request):
        self.endpoint.withdraw(request)

    async def allocate(self, count):
        return self.endpoint.ledger.allocate(count).tolist()

    async def free(self, blocks):
        self.endpoint.ledger.free(blocks)

    async def states(self):
        ledger = self.endpoint.ledger
        return [str(ledger.state(i)) for i in range(ledger.num_blocks)]

    async def stats(self):
        return asdict(self.endpoint.stats())

    async def quiet(self, seconds):
        return await self.endpoint.quiet(seconds=seconds)

    async def lent(self):
        return sum(len(s.lent) + len(s.inbound) for s in self.sessions)


async def answer(peer, command):
    name, number = command.pop("do"), command.pop("number")
    try:
        said = {"number": number, "value": await getattr(peer, name)(**command)}
    except FastKVError as error:
        said = {"number": number, "error": type(error).__name__, "text": str(error)}
    print(json.dumps(said), flush=True)


async def main(options):
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    peer = Peer(options)
    async with peer.endpoint:
        print(json.dumps({"number": -1, "value": await peer.endpoint.listen()}), flush=True)
        tasks = set()
        while line := await reader.readline():
            tasks.add(task := asyncio.create_task(answer(peer, json.loads(line))))
            task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
