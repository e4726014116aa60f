# SPDX-License-Identifier: Apache-2.0
"""fastkv.transfer against the engine alone: two processes on loopback, memory of the CPU.

    python benchmarks/bench_transfer.py --json benchmarks/results/transfer.json

For each size of a block's part, a process moves 64 MiB of scattered blocks to and from another: by
NIXL alone (descriptors made beforehand, posted at once, polled), by `Session.push` and by
`Session.pull`, with checksums and without, taking turns; the figures are medians. Then a request of
32,768 tokens moves in three formats, its blocks neighbours, as they come from one allocation.

Needs NIXL: `pip install --no-deps nixl-cu12==1.5.1`, and the extra `transfer`.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import fastkv
from fastkv import CacheSpec, StaticScales
from fastkv.transfer import Endpoint, Fingerprint, Progress, Regions, Session
from fastkv.transfer.engine import descriptors

TRANSPORTS = {"default": {}, "tcp": {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}}
KIB = 1024
# Bytes of a block's part: KV heads and tokens a page, D 128, bf16.
PARTS = {4: (1, 16), 16: (4, 16), 64: (8, 32), 256: (8, 128), 1024: (16, 256)}
FORMATS = ("none", "cache_fp8", "block_wise_fp8", "cache_int4_zp")
D, SECONDS, WARM_UP = 128, 60.0, 1


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    if arguments.serve is not None:
        asyncio.run(serve(json.loads(arguments.serve)))
        return {}
    if arguments.transport is None:
        found = both(arguments)
        Console().print(table(found))
    else:
        os.environ.update(TRANSPORTS[arguments.transport])
        found = document(asyncio.run(measure(arguments)))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=64, help="MiB of a transfer")
    parser.add_argument("--tokens", type=int, default=32768, help="of the request")
    parser.add_argument("--quick", action="store_true", help="little of everything, for a test")
    parser.add_argument("--transport", choices=TRANSPORTS, help="one alone, and no table")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.megabytes, arguments.tokens = 1, 1, 512
    return arguments


def both(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each transport in processes of its own: UCX reads its variables once."""
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for transport in TRANSPORTS:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            options = [f"--{name}={getattr(arguments, name)}" for name in _PASSED]
            command = [sys.executable, __file__, *options, "--transport", transport]
            subprocess.run([*command, "--json", str(path)], check=True)
            found = json.loads(path.read_text("utf-8"))
        rows += found["rows"]
    return {**found, "rows": rows}


_PASSED = ("rounds", "megabytes", "tokens")


# Both sides


def spec_of(case: dict[str, Any]) -> CacheSpec:
    return CacheSpec(case["layers"], case["heads"], D, case["page"], case["format"], "bfloat16")


@asynccontextmanager
async def endpoint_of(case: dict[str, Any], seed: int) -> AsyncIterator[Endpoint]:
    spec = spec_of(case)
    caches = spec.allocate(case["blocks"])
    rng = np.random.default_rng(seed)
    for cache in caches:
        raw = cache.view(np.uint8)
        raw[...] = rng.integers(0, 256, raw.shape[1:], np.uint8)
        raw.reshape(len(raw), -1)[:, 0] = np.arange(len(raw)) % 251  # neighbours differ
    scales = None
    if spec.layer_quant(0).needs_static:
        each = [np.full((case["heads"], D), 2.0, np.float32)] * 4
        zero_points = spec.layer_quant(0).needs_zp
        if not zero_points:
            each = [values[:, 0] for values in each]
        bundle = StaticScales(*each, *each[: 2 * zero_points])
        scales = dict.fromkeys(range(case["layers"]), bundle)
    fingerprint = Fingerprint.of(spec, model="bench", scales=scales)
    options = {"checksums": case["checksums"]}
    async with Endpoint(Regions(spec, caches), fingerprint, **options) as endpoint:
        yield endpoint


async def serve(case: dict[str, Any]) -> None:
    """The other process: takes what comes, offers blocks, until its input ends."""
    async with endpoint_of(case, 1) as endpoint:
        offered = endpoint.ledger.allocate(case["blocks"] // 2)[:: case["apart"]]
        endpoint.offer("pull", offered[: case["moved"]])
        print(await endpoint.listen(), flush=True)
        free = asyncio.create_task(take(endpoint))
        await asyncio.to_thread(sys.stdin.read)
        free.cancel()


async def take(endpoint: Endpoint) -> None:
    number = 0
    while True:
        received = await endpoint.receive(f"push {number}")
        endpoint.ledger.free(received.blocks)
        number += 1


@asynccontextmanager
async def connected(case: dict[str, Any]) -> AsyncIterator[tuple[Endpoint, Session]]:
    command = [sys.executable, __file__, "--serve", json.dumps(case)]
    pipe = subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(await process.stdout.readline())
        async with endpoint_of(case, 0) as endpoint:
            yield endpoint, await endpoint.connect("127.0.0.1", port)
    finally:
        process.stdin.close()
        await process.wait()


# What is timed


class Moves:
    """The contenders over one pair of endpoints."""

    def __init__(self, case: dict[str, Any], endpoint: Endpoint, session: Session) -> None:
        self.endpoint, self.session = endpoint, session
        self.ids = endpoint.ledger.allocate(case["blocks"] // 2)[:: case["apart"]]
        self.ids = self.ids[: case["moved"]]
        theirs = np.arange(case["blocks"] // 2, case["blocks"] // 2 + len(self.ids))
        regions = endpoint.regions.regions
        self.runs = descriptors(regions, session.regions, self.ids, theirs)
        self.nbytes = len(self.ids) * endpoint.regions.block_nbytes
        self.pushed = 0

    async def raw(self) -> None:
        await self.endpoint.mover.call(self._raw)

    def _raw(self) -> None:
        engine = self.endpoint._engine
        handle = engine.post(self.session.peer, True, *self.runs)
        while (progress := engine.poll(handle)) is Progress.MOVING:
            pass
        engine.release(handle)
        assert progress is Progress.DONE

    async def push(self) -> None:
        outcome = await self.session.push(f"push {self.pushed}", self.ids, seconds=SECONDS)
        self.pushed += 1
        assert outcome.state == "done", outcome.reason

    async def pull(self) -> None:
        outcome = await self.session.pull("pull", seconds=SECONDS)
        assert outcome.state == "done", outcome.reason
        self.endpoint.ledger.free(outcome.blocks)


async def times(rounds: int, contenders: dict[str, Callable[[], Awaitable[None]]]) -> Any:
    """Seconds of each contender, by turns."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(WARM_UP + rounds):
        for name, go in contenders.items():
            started = perf_counter()
            await go()
            if i >= WARM_UP:
                samples[name].append(perf_counter() - started)
    return {name: median(taken) for name, taken in samples.items()}


async def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for kib, (heads, page) in PARTS.items():
        part = heads * page * D * 2
        assert part == kib * KIB
        moved = max(2, arguments.megabytes * KIB * KIB // (2 * part))
        case = {"layers": 1, "heads": heads, "page": page, "format": "none", "moved": moved}
        case |= {"blocks": 4 * moved + 4, "apart": 2}
        for checksums in (False, True):
            rows.append(await row("part", {**case, "checksums": checksums}, arguments, part))
    for name in FORMATS:
        moved = arguments.tokens // 16
        case = {"layers": 4, "heads": 8, "page": 16, "format": name, "moved": moved}
        case |= {"blocks": 2 * moved, "apart": 1, "checksums": True}
        rows.append(await row("request", case, arguments, None))
    return rows


async def row(
    kind: str, case: dict[str, Any], arguments: argparse.Namespace, part: int | None
) -> dict[str, Any]:
    async with connected(case) as (endpoint, session):
        moves = Moves(case, endpoint, session)
        contenders = {"raw": moves.raw, "push": moves.push, "pull": moves.pull}
        seconds = await times(arguments.rounds, contenders)
    speeds = {name: moves.nbytes / taken / 1e9 for name, taken in seconds.items()}
    return {
        "kind": kind,
        "transport": arguments.transport,
        "format": case["format"],
        "part_bytes": part,
        "checksums": case["checksums"],
        "blocks": len(moves.ids),
        "bytes": moves.nbytes,
        **{f"{name}_s": taken for name, taken in seconds.items()},
        **{f"{name}_GBps": speed for name, speed in speeds.items()},
        "push_ratio": speeds["push"] / speeds["raw"],
        "pull_ratio": speeds["pull"] / speeds["raw"],
    }


# What is written


def table(found: dict[str, Any]) -> Table:
    made = Table(title=f"{found['device']}, {found['cores']} cores, loopback")
    for name in ("transport", "what", "sums", "MB", "NIXL GB/s", "push", "pull", "push ms"):
        made.add_column(name, justify="left" if name in {"transport", "what"} else "right")
    for each in found["rows"]:
        part = each["part_bytes"]
        made.add_row(
            each["transport"],
            each["format"] if part is None else f"parts of {part // KIB} KiB",
            "yes" if each["checksums"] else "no",
            f"{each['bytes'] / 1e6:.0f}",
            f"{each['raw_GBps']:.2f}",
            f"{each['push_ratio']:.2f}",
            f"{each['pull_ratio']:.2f}",
            f"{1e3 * each['push_s']:.1f}",
        )
    return made


def document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "benchmark": "bench_transfer",
        "commit": commit(),
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "versions": {
            "fastkv": fastkv.__version__,
            "nixl": version("nixl-cu12"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
    }


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
