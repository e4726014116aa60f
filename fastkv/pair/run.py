# SPDX-License-Identifier: Apache-2.0
"""Starts the processes of the example, and puts together what they tell."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from fastkv.errors import TransferError
from fastkv.pair.job import OP, Job
from fastkv.transfer import TransferState

#: `(event's name, request or None)`, as things happen.
Told = Callable[[str, int | None], None]

_WORKER = (sys.executable, "-m", "fastkv.pair.worker")
_LINE = 1 << 20  # bytes of an event, at most


@dataclass(slots=True)
class Row:
    """One request.

    Attributes:
        request: its number.
        prompt_tokens: tokens of its prompt.
        blocks: pages that moved.
        nbytes: bytes that moved, scales included.
        prefill_s: seconds that its prompt took.
        transfer_s: from the call of `push` to the receiver's word that every block is verified.
        decode_s: seconds that its new tokens took.
        tokens: of the two processes.
        expected: of one process.
    """

    request: int
    prompt_tokens: int
    blocks: int = 0
    nbytes: int = 0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether the two processes gave one process's tokens."""
        return bool(self.tokens) and self.tokens == self.expected

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "same": self.same}


@dataclass(frozen=True, slots=True)
class Served:
    """What came of a job.

    Attributes:
        rows: one a request.
        stats: the endpoint's figures of each process, as text.
    """

    rows: tuple[Row, ...]
    stats: dict[str, str]


class Child:
    """One worker process.

    Args:
        process: it.
        role: what it does.
    """

    def __init__(self, process: asyncio.subprocess.Process, role: str) -> None:
        self.process, self.role = process, role
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr

    @classmethod
    async def start(cls, role: str, job: Job) -> "Child":
        """Start a worker and tell it the job."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *_WORKER, role, stdin=pipe, stdout=pipe, stderr=pipe, limit=_LINE, env=_environment()
        )
        child = cls(process, role)
        await child.tell(job.encode())
        return child

    async def tell(self, line: str) -> None:
        """Write a line to its standard input; a child that is gone says so by its events."""
        with suppress(ConnectionError):
            self._stdin.write(line.encode() + b"\n")
            await self._stdin.drain()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """What it tells, until it ends.

        Raises:
            TransferError: it ended otherwise than well, or says that a transfer did.
        """
        errors = asyncio.create_task(self._stderr.read())
        try:
            async for line in self._stdout:
                event = json.loads(line)
                if event["event"] == "error":
                    raise TransferError(OP, f"the {self.role} process: {event['text']}")
                yield event
            if await self.process.wait() != 0:
                said = (await errors).decode("utf-8", "replace").strip().splitlines() or ["nothing"]
                reason = f"the {self.role} process ended with {self.process.returncode}: {said[-1]}"
                raise TransferError(OP, reason)
        finally:
            errors.cancel()

    async def end(self) -> None:
        """Kill it if it still runs."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


def _environment() -> dict[str, str]:
    """One thread of BLAS a process, unless the caller says otherwise: two share the cores."""
    return {**dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"), **os.environ}


def serve(job: Job, told: Told = lambda event, request: None) -> Served:
    """Serve a job by two processes, then by one.

    Args:
        job: the requests.
        told: called as things happen.

    Raises:
        TransferError: a process failed, or a transfer did not end DONE.
    """
    return asyncio.run(_serve(job, told))


async def _serve(job: Job, told: Told) -> Served:
    rows = tuple(Row(i, len(prompt)) for i, prompt in enumerate(job.prompts))
    stats: dict[str, str] = {}
    await _pair(job, rows, stats, told)
    # Afterwards, so that its work does not lengthen the pair's times.
    await _alone(job, rows, told)
    return Served(rows, stats)


async def _pair(job: Job, rows: tuple[Row, ...], stats: dict[str, str], told: Told) -> None:
    decode = await Child.start("decode", job)
    prefill = await Child.start("prefill", job)
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def follow(child: Child) -> None:
        async for event in child.events():
            told(event["event"], event.get("request"))
            if event["event"] == "ready" and "port" in event:
                port.set_result(event["port"])
            elif event["event"] == "loaded":
                await child.tell(str(await port))
            elif event["event"] == "stats":
                stats[child.role] = event["table"]
            else:
                _note(rows, event)

    followers = [asyncio.create_task(follow(child)) for child in (decode, prefill)]
    try:
        # The first that fails ends both: the other would wait for it.
        await asyncio.gather(*followers)
    finally:
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        for child in (decode, prefill):
            await child.end()


async def _alone(job: Job, rows: tuple[Row, ...], told: Told) -> None:
    child = await Child.start("alone", job)
    try:
        async for event in child.events():
            told(f"alone {event['event']}", event.get("request"))
            if event["event"] == "token":
                rows[event["request"]].expected.append(event["token"])
    finally:
        await child.end()


def _note(rows: tuple[Row, ...], event: dict[str, Any]) -> None:
    if "request" not in event:
        return
    row = rows[event["request"]]
    if event["event"] == "prefilled":
        row.prefill_s = event["seconds"]
    elif event["event"] == "received":
        row.blocks = event["blocks"]
    elif event["event"] == "token":
        row.tokens.append(event["token"])
    elif event["event"] == "decoded":
        row.decode_s = event["seconds"]
    elif event["event"] == "pushed":
        if event["state"] != TransferState.DONE:
            reason = f"request {row.request} is {event['state']}: {event['reason']}"
            raise TransferError(OP, reason)
        row.nbytes, row.transfer_s = event["nbytes"], event["seconds"]
