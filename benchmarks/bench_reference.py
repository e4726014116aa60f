# SPDX-License-Identifier: Apache-2.0
"""The NumPy reference at decode against PyTorch's CPU attention, in one process.

    python benchmarks/bench_reference.py --json benchmarks/results/reference_cpu.json

Every round runs the peer and each format once, one after the other, so that both meet the same
state of the machine; the figures are medians over the rounds. The peer is
`scaled_dot_product_attention(..., enable_gqa=True)` over the same keys and values, made contiguous
beforehand, in float32. Needs PyTorch: `pip install 'fastkv[torch]'`.
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastkv
from fastkv import CacheSpec, LayerCache, StaticScales, ops
from fastkv.quant import QUANT_SPECS, QuantSpec

BATCH, CONTEXT, HQ, HKV, D, PAGE = 8, 4096, 9, 3, 64, 16


def main() -> None:
    arguments = parse()
    rng = np.random.default_rng(0)
    batch = make_batch(rng)
    runs: dict[str, Callable[[], Any]] = {"torch sdpa": make_peer(batch)}
    runs["none float32"] = make_run(batch, QUANT_SPECS["none"], "float32")
    for quant in QUANT_SPECS.values():
        runs[quant.name.value] = make_run(batch, quant, "bfloat16")
    agree(runs)
    seconds = measure(runs, arguments.rounds)
    report(seconds, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def make_batch(rng: np.random.Generator) -> dict[str, Any]:
    pages = BATCH * CONTEXT // PAGE
    return {
        "q": rng.standard_normal((BATCH, HQ, D)).astype(np.float32),
        "k": rng.standard_normal((BATCH * CONTEXT, HKV, D)).astype(np.float32),
        "v": rng.standard_normal((BATCH * CONTEXT, HKV, D)).astype(np.float32) * 2,
        "table": rng.permutation(pages).astype(np.int32).reshape(BATCH, -1),
    }


def make_peer(batch: dict[str, Any]) -> Callable[[], Any]:
    def contiguous(x: Any) -> torch.Tensor:
        per_request = x.reshape(BATCH, CONTEXT, HKV, D).transpose(0, 2, 1, 3)
        return torch.from_numpy(np.ascontiguousarray(per_request))

    q = torch.from_numpy(batch["q"])[:, :, None]
    k, v = contiguous(batch["k"]), contiguous(batch["v"])

    def attend() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out[:, :, 0].numpy()

    return attend


def make_run(batch: dict[str, Any], quant: QuantSpec, dtype: str) -> Callable[[], Any]:
    """Fill a cache through `rope_write_kv`, and return the decode step over it."""
    spec = CacheSpec(1, HKV, D, PAGE, quant.name, dtype)
    tensors = dict(
        zip(("k", "v", "k_scale", "v_scale"), spec.allocate(batch["table"].size), strict=False)
    )
    ranges = [f(batch[s], axis=0) for s in "kv" for f in (np.min, np.max)]
    static = StaticScales.from_minmax(*ranges, quant.name) if quant.needs_static else None
    cache = LayerCache(spec, 0, **tensors, static=static)
    unused_q = np.ones((len(batch["k"]), HKV * D), np.float32)
    qkv = np.concatenate([unused_q, *(batch[s].reshape(-1, HKV * D) for s in "kv")], axis=1)
    zeros = np.zeros(BATCH, np.int32)
    every = np.arange(0, len(qkv) + 1, CONTEXT, dtype=np.int32)
    ops.rope_write_kv(
        qkv, cache, cu_seqlens_q=every, cache_seqlens=zeros, block_table=batch["table"]
    )
    one = np.arange(BATCH + 1, dtype=np.int32)
    cached = np.full(BATCH, CONTEXT - 1, np.int32)
    return lambda: ops.paged_attention(
        batch["q"],
        replace(cache),
        cu_seqlens_q=one,
        cache_seqlens=cached,
        block_table=batch["table"],
    )


def agree(runs: dict[str, Callable[[], Any]]) -> None:
    """The runs are of the same attention: within rounding for float32, roughly for the others."""
    want = runs["torch sdpa"]()
    for name, run in runs.items():
        error = np.linalg.norm(run() - want) / np.linalg.norm(want)
        assert error < (1e-5 if name == "none float32" else 0.25), (name, error)


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(rounds), "rounds", console=Console(stderr=True), transient=True):
        for name, run in runs.items():
            start = perf_counter()
            run()
            seconds[name].append(perf_counter() - start)
    return seconds


def report(seconds: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    medians = {name: median(values) for name, values in seconds.items()}
    peer = medians["torch sdpa"]
    table = Table(
        title=f"decode, batch {BATCH} x {CONTEXT}, Hq {HQ}, Hkv {HKV}, D {D}, page {PAGE}"
    )
    for column in ("run", "median ms", "min ms", "x peer"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, values in seconds.items():
        cells = (1e3 * medians[name], 1e3 * min(values), medians[name] / peer)
        table.add_row(name, *(f"{cell:.2f}" for cell in cells))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(document(seconds, medians, arguments), indent=2) + "\n"
        )


def document(
    seconds: dict[str, list[float]], medians: dict[str, float], arguments: argparse.Namespace
) -> dict[str, Any]:
    peer = medians["torch sdpa"]
    return {
        "benchmark": "bench_reference",
        "commit": commit(),
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "versions": {
            "fastkv": fastkv.__version__,
            "numpy": np.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "shape": {"batch": BATCH, "context": CONTEXT, "Hq": HQ, "Hkv": HKV, "D": D, "page": PAGE},
        "rows": [
            {
                "run": name,
                "median_s": medians[name],
                "min_s": min(values),
                "x_peer": medians[name] / peer,
            }
            for name, values in seconds.items()
        ],
    }


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    here = Path(__file__).parent
    return subprocess.run(
        command, cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
