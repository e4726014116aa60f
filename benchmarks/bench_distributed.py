# SPDX-License-Identifier: Apache-2.0
"""A decode step over a context on several GPUs of one host, against one GPU.

    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py --json distributed.json

From the root of a checkout (PYTHONPATH=. if fastkv is not installed). A row is one layer's
rope_write_kv and paged_attention for one new token a request, `fastkv.distributed` over all ranks;
its peer is the ops on rank 0's GPU alone, which holds the whole context, in the same process,
interleaved. Every rank makes the same number of calls, so the clock is here and not gpu.timing's.
"""

import argparse
import os
from collections.abc import Callable
from datetime import timedelta
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from fastkv import ops
from fastkv.distributed import ContextParallel
from gpu import report
from gpu.data import Batch, Format, Pool, relative_difference
from gpu.report import Report
from gpu.timing import Timing, rotations

QUERY_HEADS, HEADS, DIM = 32, 8, 128
WARM_UP = 3
KERNELS = ("rope_write_kv", "paged_attention", "merge_states")
AGREE = 0.01  # of the norm: merging rounds to bf16 once, like one GPU; the parts are in float32


def main(argv: list[str] | None = None) -> Report:
    """One rank's run; rank 0 prints and writes."""
    arguments = parse(argv)
    device = join(arguments)
    torch.manual_seed(arguments.seed)
    found = report.start("bench_distributed", arguments, device=device.type, kernels=KERNELS)
    found.device = device
    found.ceilings = {"ranks": float(dist.get_world_size())}
    pages = (arguments.page,) if arguments.page else found.pages
    for fmt in found.formats:
        for context in arguments.contexts:
            for requests in arguments.batches:
                for page in pages:
                    run_case(found, fmt, requests, context, page)
                    if dist.get_rank() == 0:
                        found.write()
    dist.barrier()
    dist.destroy_process_group()
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: gloo")
    parser.add_argument("--contexts", type=_numbers, default=[131072], help="new token included")
    parser.add_argument("--batches", type=_numbers, default=[1, 4], help="requests")
    parser.add_argument("--page", type=int, help="one page size; otherwise 16 and 64")
    parser.add_argument("--calls", type=int, default=16, help="calls of one sample")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def join(arguments: argparse.Namespace) -> torch.device:
    """Join the ranks of torchrun, and choose this one's device."""
    rank = int(os.environ["LOCAL_RANK"])
    kind = arguments.device
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=120))
    return device


def run_case(found: Report, fmt: Format, requests: int, context: int, page: int) -> None:
    """One row. All ranks hold the same random pool, so that each knows the whole context."""
    shape = f"{requests}x{context} Hq{QUERY_HEADS} Hkv{HEADS} D{DIM} P{page}"
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if not found.wants(shape):
        return
    token = Pool.bytes_per_token_of(fmt, HEADS, DIM)
    sets = rotations(requests * context * token // ranks, found.device)
    torch.manual_seed(found.arguments.seed)
    pool = Pool.random(fmt, HEADS, DIM, requests * context, sets, found.device)
    batch = Batch.make(requests, 1, context, page, found.device)
    width = (QUERY_HEADS + 2 * HEADS) * DIM
    qkv = torch.randn(requests, width, device=found.device).bfloat16()
    layers = [pool.layer(page, i) for i in range(sets)]
    parallel = ContextParallel(dist.group.WORLD, page, timeout=60)
    step = parallel.step(**batch.meta)

    def alone(layer: Any) -> torch.Tensor:
        q = ops.rope_write_kv(qkv, layer, **batch.meta)
        return ops.paged_attention(q, layer, **batch.meta)

    def together(layer: Any) -> torch.Tensor:
        return step.paged_attention(step.rope_write_kv(qkv, layer), layer)

    off = relative_difference(together(layers[0]), alone(layers[0]))
    if not off < AGREE:
        found.failed(f"{fmt.label} {shape}", ValueError(f"differs from one GPU by {off:.3g}"))
    times = measure(found, {"together": together, "alone": alone}, layers)
    if rank == 0:
        size = requests * context * token // ranks
        peers = {"one GPU": times["alone"]}
        shape = f"{shape} R{ranks}"
        found.add("decode_step", fmt.label, shape, times["together"], size, peers, off=off)


def measure(
    found: Report, contenders: dict[str, Callable[[Any], Any]], layers: list[Any]
) -> dict[str, Timing]:
    """Times of one call; samples of the contenders take turns, the same number on every rank."""
    arguments = found.arguments
    calls = len(layers) * max(1, arguments.calls // len(layers))
    on_gpu = found.device.type == "cuda"
    graphs = on_gpu and not arguments.eager
    players = {
        name: player(lambda go=go: [go(layers[i % len(layers)]) for i in range(calls)], graphs)
        for name, go in contenders.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in players}
    for i in range(WARM_UP + arguments.replays):
        for name, go in players.items():
            us = sample(go, on_gpu) / calls
            if i >= WARM_UP:
                samples[name].append(us)
    mode = "graph" if graphs else "eager"
    return {name: summary(taken, mode) for name, taken in samples.items()}


def player(work: Callable[[], Any], graphs: bool) -> Callable[[], Any]:
    """The work, or the replay of a graph of it; a graph needs its kernels and checks known."""
    if not graphs:
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


def sample(go: Callable[[], Any], on_gpu: bool) -> float:
    """Microseconds of one sample, from when all ranks are ready."""
    dist.barrier()
    if not on_gpu:
        start = perf_counter()
        go()
        return (perf_counter() - start) * 1e6
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    go()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def summary(samples: list[float], mode: str) -> Timing:
    low, _, high = quantiles(samples, n=4)
    return Timing(median(samples), high - low, mode)


if __name__ == "__main__":
    main()
