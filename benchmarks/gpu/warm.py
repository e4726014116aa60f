# SPDX-License-Identifier: Apache-2.0
"""Build FlashInfer's modules ahead, one process a module, before anything is timed."""

import argparse
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gpu import peers, prefill_peers
from gpu.data import FORMATS, Batch, Pool

# Longest first. Processes times jobs of each: as many compilers as 16 cores and their memory bear.
PROCESSES, JOBS = 10, 3


def modules(pages: tuple[int, ...], *, drafts: bool = True) -> dict[str, Callable[[], None]]:
    """What builds each module, by a name that is one word."""
    found: dict[str, Callable[[], None]] = {}
    if drafts:
        found["fa3/none"] = lambda: _attend("none", 16, 8, 32, 4, "fa3")
    for fmt in ("cache_fp8", "none"):
        found[f"fa2/{fmt}"] = lambda f=fmt: _attend(f, 16, 8, 32, 1, "fa2")
        for page in pages:
            for queries in (1, 4, 8) if drafts else (1,):
                found[f"xqa/{fmt}/{page}/q{queries}"] = lambda f=fmt, p=page, q=queries: _attend(
                    f, p, 8, 32, q, "xqa"
                )
            found[f"xqa/{fmt}/{page}/tp8"] = lambda f=fmt, p=page: _attend(f, p, 1, 8, 1, "xqa")
    found["append"] = _append
    return found


def prefill_modules() -> dict[str, Callable[[], None]]:
    """The modules of `bench_prefill.py`, longest first."""
    found: dict[str, Callable[[], None]] = {}
    for dim in (256, 128, 64):
        found[f"prefill/fa3/{dim}"] = lambda d=dim: _prefill(d, "fa3", ragged=False)
    found["prefill/fa2/128"] = lambda: _prefill(128, "fa2", ragged=False)
    for backend in ("fa3", "fa2"):
        found[f"prefill/ragged/{backend}"] = lambda b=backend: _prefill(128, b, ragged=True)
    return found


def _prefill(dim: int, backend: str, *, ragged: bool) -> None:
    device = torch.device("cuda")
    q, k, v = (torch.randn(256, h, dim, device=device, dtype=torch.bfloat16) for h in (32, 8, 8))
    if ragged:
        prefill_peers.flashinfer_ragged([(q, k, v)], (100, 156), True, backend).calls[0]()
    else:
        for causal in (True, False):
            prefill_peers.flashinfer_single([(q, k, v)], causal, backend).calls[0]()
    torch.cuda.synchronize()


def _attend(fmt: str, page: int, heads: int, query_heads: int, queries: int, kind: str) -> None:
    device = torch.device("cuda")
    pool = Pool.random(FORMATS[fmt], heads, 128, 2 * 256, 1, device)
    batch = Batch.make(2, queries, 256, page, device)
    q = torch.randn(2 * queries, query_heads, 128, device=device, dtype=torch.bfloat16)
    for name, make in peers.decode_peers(pool, batch, q):
        if name.lower().endswith(kind):
            make().calls[0]()
    torch.cuda.synchronize()


def _append() -> None:
    device = torch.device("cuda")
    batch = Batch.make(1, 64, 64, 16, device)
    q, k, v = (torch.randn(64, h, 128, device=device, dtype=torch.bfloat16) for h in (32, 8, 8))
    _, index = peers.index_kernel(batch, 64)
    cache = torch.zeros(4, 16, 8, 128, device=device, dtype=torch.bfloat16)
    small = cache.to(torch.float8_e4m3fn)
    positions = torch.arange(64, device=device, dtype=torch.int32)
    table = torch.randn(64, 128, device=device)
    peers.append(peers.AppendInputs(q, k, v, cache, cache.clone()), batch, index)()
    inputs = peers.AppendInputs(q, k, v, small, small.clone())
    peers.rope_append(inputs, batch, index, table, 1.0, positions)()
    torch.cuda.synchronize()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a benchmark whose peers compile modules."""
    parser.add_argument("--warm", action="store_true", help="only build the peers' modules")
    parser.add_argument("--warm-one", help=argparse.SUPPRESS)


def build(names: list[str], command: list[str]) -> list[str]:
    """Build every module in a process of its own; returns the names of those that failed."""
    environment = {**os.environ, "MAX_JOBS": str(JOBS)}

    def one(name: str) -> bool:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command, "--warm-one", name],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        tail = "" if not done.returncode else f" FAILED: {done.stderr[-400:]}"
        print(f"warm {name} {time.perf_counter() - start:.0f} s{tail}", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(PROCESSES) as threads:
        built = list(threads.map(one, names))
    return [name for name, good in zip(names, built, strict=True) if not good]


def save(path: Path) -> None:
    """Pack the built modules as FlashInfer takes prebuilt ones: `<name>/<name>.so`."""
    from flashinfer.jit import env

    with tarfile.open(path, "w:gz") as archive:
        for library in sorted(Path(env.FLASHINFER_JIT_DIR).glob("*/*.so")):
            if library.stem == library.parent.name:
                archive.add(library, f"{library.stem}/{library.name}")
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
