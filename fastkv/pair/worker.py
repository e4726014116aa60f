# SPDX-License-Identifier: Apache-2.0
"""One process of the example: `python -m fastkv.pair.worker ROLE`.

Reads the job, a line of JSON, from standard input, and for `prefill` a second line, the port of
decode. Writes one JSON object a line to standard output: `{"event": …, "request": …, …}`.
"""

import asyncio
import json
import sys
from time import perf_counter
from typing import Any

import numpy as np

from fastkv.errors import FastKVError
from fastkv.pair.job import Job, Server
from fastkv.transfer import Endpoint, Regions, Session, TransferState

HOST = "127.0.0.1"


def emit(event: str, **fields: Any) -> None:
    """Tell the parent."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def alone(server: Server) -> None:
    """Both halves in this process: what the pair's tokens are compared with."""
    emit("ready")
    first = 0
    for request in range(len(server.job.prompts)):
        pages = np.arange(first, first := first + server.job.pages(request, whole=True))
        start = perf_counter()
        server.prefill(request, pages)
        emit("prefilled", request=request, seconds=perf_counter() - start)
        _decode(server, request, pages)


async def decode(server: Server) -> None:
    """Take requests as they come, and continue each."""
    async with _endpoint(server) as endpoint:
        emit("ready", port=await endpoint.listen(HOST))
        requests = range(len(server.job.prompts))
        waiting = {asyncio.create_task(endpoint.receive(str(i))): i for i in requests}
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                request, received = waiting.pop(task), task.result()
                emit("received", request=request, blocks=len(received.blocks))
                more = server.job.pages(request, whole=True) - len(received.blocks)
                blocks = np.append(received.blocks, endpoint.ledger.allocate(more)).astype(int)
                await asyncio.to_thread(_decode, server, request, blocks)
                endpoint.ledger.free(blocks)
        _report(endpoint)


async def prefill(server: Server, port: int) -> None:
    """Compute each prompt, and push its pages while the next one is computed."""
    async with _endpoint(server) as endpoint:
        peer = await endpoint.connect(HOST, port)
        emit("ready")
        pushes = []
        for request in range(len(server.job.prompts)):
            blocks = endpoint.ledger.allocate(server.job.pages(request, whole=False))
            start = perf_counter()
            await asyncio.to_thread(server.prefill, request, blocks)
            emit("prefilled", request=request, seconds=perf_counter() - start)
            pushes.append(asyncio.create_task(_push(server.job, peer, request, blocks)))
        await asyncio.gather(*pushes)
        _report(endpoint)


async def _push(job: Job, peer: Session, request: int, blocks: Any) -> None:
    outcome = await peer.push(str(request), blocks, seconds=job.seconds)
    emit(
        "pushed",
        request=request,
        state=outcome.state.value,
        reason=outcome.reason,
        nbytes=outcome.nbytes,
        seconds=outcome.seconds,
    )
    if outcome.state is TransferState.DONE:
        peer.endpoint.ledger.free(blocks)


def _endpoint(server: Server) -> Endpoint:
    regions = Regions(server.spec, server.caches)
    return Endpoint(regions, server.fingerprint(), engine=server.job.engine)


def _decode(server: Server, request: int, pages: Any) -> None:
    start = perf_counter()
    for token in server.decode(request, pages):
        emit("token", request=request, token=token)
    emit("decoded", request=request, seconds=perf_counter() - start)


def _report(endpoint: Endpoint) -> None:
    emit("stats", table=endpoint.stats().table())


def main() -> None:
    """Run the role that the command line names."""
    role = sys.argv[1]
    server = Server(Job.decode(sys.stdin.readline()), whole=role != "prefill")
    if role == "alone":
        alone(server)
    elif role == "decode":
        asyncio.run(decode(server))
    else:
        emit("loaded")
        asyncio.run(prefill(server, int(sys.stdin.readline())))


if __name__ == "__main__":
    try:
        main()
    except FastKVError as error:
        emit("error", text=str(error))
        sys.exit(1)
