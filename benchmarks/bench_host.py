# SPDX-License-Identifier: Apache-2.0
"""Time of the host in one eager call of each op, beside FlashInfer's plan() and run().

    python benchmarks/bench_host.py --json benchmarks/results/host.json

The work on the GPU is tiny, so that the host is what limits. fastkv has no plan: what stands
beside `paged_attention` is FlashInfer's `run()` alone, and its `plan()`, once a step, on top.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from fastkv import Rope, ops
from fastkv.ops.cuda import listing
from gpu import peers, report
from gpu.data import Batch, Format, Pool
from gpu.report import Report
from gpu.timing import Timer, Timing

REQUESTS, CONTEXT, HQ, HKV, D = 64, 128, 32, 8, 128
CALLS = 2000
PEER_OF = {"paged_attention": "FlashInfer run()", "rope_write_kv": "FlashInfer append()"}


def main(argv: list[str] | None = None, timer: Timer | None = None, device: str = "cuda") -> Report:
    """Run from a command line; the other arguments are for tests without a GPU."""
    arguments = report.parser(__doc__).parse_args(argv)
    found = report.start("bench_host", arguments, timer, device, kernels=listing.launchers())
    figures = peer_figures(found) if found.with_peers else {}
    for page in found.pages:
        for fmt in found.formats:
            run(found, fmt, page, figures)
            found.write()
    found.write()
    return found


def run(found: Report, fmt: Format, page: int, figures: dict[str, Timing]) -> None:
    """One row an op."""
    shape = f"{REQUESTS}x{CONTEXT} Hq{HQ} Hkv{HKV} D{D} P{page}"
    if not found.wants(shape):
        return
    pool = Pool.random(fmt, HKV, D, REQUESTS * CONTEXT, 1, found.device)
    batch = Batch.make(REQUESTS, 1, CONTEXT, page, found.device)
    beside = {name: time.us for name, time in figures.items()}
    for op, call in calls(pool, batch, found.device):
        cost = found.attempt(f"{op} {fmt.label} {shape}", partial(cost_of, found, call))
        if cost is not None:
            peer = PEER_OF.get(op, "")
            own = {peer: figures[peer]} if peer in figures else None
            found.add(op, fmt.label, shape, cost, 0, own, beside=beside)


def cost_of(found: Report, call: Callable[[], Any], calls: int = CALLS) -> Timing:
    return found.timer.host_cost(call, calls)


def calls(
    pool: Pool, batch: Batch, device: torch.device
) -> Iterable[tuple[str, Callable[[], Any]]]:
    """Every op over the same small cache."""
    layer, rows = pool.layer(batch.page, 0), REQUESTS
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    q, qkv = make(rows, HQ, D), make(rows, (HQ + 2 * HKV) * D)
    tables = Rope.from_theta(10000.0, rotary_dim=D, max_len=CONTEXT)
    rope = Rope(*(torch.from_numpy(x).to(device) for x in (tables.cos, tables.sin)))
    out = torch.empty_like(q)
    yield "paged_attention", partial(ops.paged_attention, q, layer, **batch.meta, out=out)
    yield "rope_write_kv", partial(ops.rope_write_kv, qkv, layer, **batch.meta, rope=rope)
    k, v = (make(rows, HKV, D) for _ in "kv")
    one = torch.ones(rows, device=device, dtype=torch.int32)
    yield (
        "gather_kv",
        partial(
            ops.gather_kv,
            layer,
            cache_seqlens=one,
            block_table=batch.block_table,
            cu_seqlens_k=batch.cu_seqlens_q,
            out_k=k,
            out_v=v,
        ),
    )
    seqlens = {"cu_seqlens_q": batch.cu_seqlens_q, "cu_seqlens_k": batch.cu_seqlens_q}
    yield "masked_attention", partial(ops.masked_attention, q, k, v, **seqlens, out=out)
    states = (*(torch.randn(rows, HQ, device=device) for _ in "ab"), torch.clone(q))
    yield "merge_states", partial(ops.merge_states, q, states[0], states[2], states[1])
    pages = torch.arange(4, device=device, dtype=torch.int32)
    yield "copy_pages", partial(ops.copy_pages, layer, pages[:2], pages[2:])


def peer_figures(found: Report) -> dict[str, Timing]:
    """FlashInfer's plan(), run() and append(), and one call of PyTorch's attention."""
    times = {}
    for name, make in PEERS.items():
        times[name] = found.attempt(name, lambda make=make: cost_of(found, *make(found.device)))
    for name, time in times.items():
        if time is not None:
            print(f"{name}: {time.us:.1f} us", flush=True)
    return {name: time for name, time in times.items() if time is not None}


def _decode(device: torch.device) -> tuple[Any, tuple[Any, ...], torch.Tensor, torch.Tensor]:
    """A wrapper that is planned, the arguments of `plan`, and those of `run`."""
    import flashinfer

    batch = Batch.make(REQUESTS, 1, CONTEXT, 16, device)
    pages = REQUESTS * CONTEXT // 16
    cache = torch.randn(pages, 2, 16, HKV, D, device=device, dtype=torch.bfloat16)
    q = torch.randn(REQUESTS, HQ, D, device=device, dtype=torch.bfloat16)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    arguments = (*peers.pages_of(batch), HQ, HKV, D, 16)
    wrapper.plan(*arguments, q_data_type=q.dtype, kv_data_type=q.dtype)
    return wrapper, arguments, q, cache


def _plan(device: torch.device) -> tuple[Callable[[], Any], int]:
    wrapper, arguments, q, _ = _decode(device)
    return partial(wrapper.plan, *arguments, q_data_type=q.dtype, kv_data_type=q.dtype), 200


def _run(device: torch.device) -> tuple[Callable[[], Any], int]:
    wrapper, _, q, cache = _decode(device)
    return partial(wrapper.run, q, cache), CALLS


def _append(device: torch.device) -> tuple[Callable[[], Any], int]:
    batch = Batch.make(REQUESTS, 1, CONTEXT, 16, device)
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    q, k, v = make(REQUESTS, HQ, D), make(REQUESTS, HKV, D), make(REQUESTS, HKV, D)
    caches = (make(REQUESTS * CONTEXT // 16, 16, HKV, D) for _ in "kv")
    rows = torch.arange(REQUESTS, device=device, dtype=torch.int32)
    positions = torch.full_like(rows, CONTEXT - 1)
    return peers.append(peers.AppendInputs(q, k, v, *caches), batch, (rows, positions)), CALLS


def _sdpa(device: torch.device) -> tuple[Callable[[], Any], int]:
    q = torch.randn(REQUESTS, HQ, 1, D, device=device, dtype=torch.bfloat16)
    return partial(torch.nn.functional.scaled_dot_product_attention, q, q, q), CALLS


PEERS = {
    "FlashInfer plan()": _plan,
    "FlashInfer run()": _run,
    "FlashInfer append()": _append,
    "PyTorch SDPA": _sdpa,
}

if __name__ == "__main__":
    main()
