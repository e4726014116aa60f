# SPDX-License-Identifier: Apache-2.0
"""Prefill behind a cached, quantized prefix, in two ways, against FlashInfer's paged prefill.

    python benchmarks/bench_prefix.py --json benchmarks/results/prefix.json

`flash` is what the flash backends do behind the write: gather_kv brings the prefix to bf16, and
masked_attention attends over contiguous K and V. `append` is paged_attention over the pages. The
new tokens' K and V lie where the write leaves them; the write, the same in both, is not timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastkv import ops
from gpu import peers, report
from gpu.data import Batch, Format, Pool
from gpu.report import OWN, Report
from gpu.timing import Timer, Timing, rotations

OP = "prefill"
WAYS = ("flash", "append")
PEERS_READ = ("none", "cache_fp8")  # formats
AGREE = {16: 0.02, 8: 0.10, 4: 0.10}


@dataclass(frozen=True, slots=True)
class Case:
    """`batch` requests of `queries` new tokens each, the last of `context`."""

    batch: int
    queries: int
    context: int
    heads: tuple[int, int] = (32, 8)
    dim: int = 128

    def shape(self, way: str, page: int) -> str:
        """As the row names it."""
        query_heads, heads = self.heads
        rows = f"{self.batch}x{self.queries} over {self.context}"
        return f"{way} {rows} Hq{query_heads} Hkv{heads} D{self.dim} P{page}"

    @property
    def flops(self) -> int:
        """Of the pairs that causality lets through."""
        pairs = self.queries * self.context - self.queries * (self.queries - 1) // 2
        return 4 * self.batch * self.heads[0] * self.dim * pairs


CASES = [Case(8, 512, 8192), Case(1, 2048, 16384), Case(8, 64, 8192), Case(1, 64, 8192)]


def main(
    argv: list[str] | None = None,
    timer: Timer | None = None,
    device: str = "cuda",
    cases: list[Case] | None = None,
) -> Report:
    """Run from a command line; the other arguments are for tests without a GPU."""
    arguments = report.parser(__doc__).parse_args(argv)
    kernels = ("gather_kv", "masked_attention", "paged_attention")
    found = report.start("bench_prefix", arguments, timer, device, kernels=kernels)
    return found.run(CASES if cases is None else cases, run_case)


def run_case(found: Report, case: Case) -> None:
    """All rows of a case, written after each format."""
    figures: dict[str, dict[str, Timing]] = {}
    # Formats that a peer reads come first: the others are held against its figures of fp8.
    for fmt in sorted(found.formats, key=lambda fmt: fmt.label not in PEERS_READ):
        run(found, case, fmt, figures)
        found.write()


def run(found: Report, case: Case, fmt: Format, figures: dict[str, dict[str, Timing]]) -> None:
    """Both ways of one case and format, at the smallest page."""
    page = found.pages[0]
    where = f"{OP} {fmt.label} {case.shape('', page)}"
    if not any(found.wants(case.shape(way, page)) for way in WAYS):
        return
    size = case.batch * case.context * Pool.bytes_per_token_of(fmt, case.heads[1], case.dim)
    tokens, sets = case.batch * case.context, rotations(size, found.device)
    make = partial(Pool.random, fmt, case.heads[1], case.dim, tokens, sets, found.device)
    pool = found.attempt(where, make)
    if pool is None:
        return
    batch = Batch.make(case.batch, case.queries, case.context, page, found.device)
    shape = (case.batch * case.queries, case.heads[0], case.dim)
    q = torch.randn(shape, device=found.device, dtype=torch.bfloat16)
    contenders: dict[str, Any] = {}
    results = {}
    for way, make_calls in (("flash", flash_calls), ("append", append_calls)):
        calls = make_calls(case, pool, batch, q)
        results[way] = found.attempt(f"{where} {way}", calls[0])
        if results[way] is not None:
            contenders[f"{OWN} {way}"] = calls
    if len(contenders) == len(WAYS):
        bound = AGREE[fmt.bits]
        found.compare(f"{where} append", results["append"], results["flash"], bound)
    if found.with_peers and fmt.label in PEERS_READ:
        add_peers(found, where, contenders, pool, batch, q, results["flash"])
    times = found.measure(contenders, where)
    if fmt.label in PEERS_READ:
        figures[fmt.label] = {n: t for n, t in times.items() if not n.startswith(OWN)}
    against = figures.get("none" if fmt.bits == 16 else "cache_fp8", {})
    for way in WAYS:
        own = times.get(f"{OWN} {way}")
        if own is not None:
            rate = {"TFLOPs": case.flops / own.us / 1e6}
            found.add(OP, fmt.label, case.shape(way, page), own, size, against, **rate)
    if found.device.type == "cuda":
        torch.cuda.empty_cache()


def flash_calls(
    case: Case, pool: Pool, batch: Batch, q: torch.Tensor
) -> list[Callable[[], torch.Tensor]]:
    """gather_kv of the prefix, then masked_attention over it and the new tokens."""
    device = q.device
    sums = (torch.arange(case.batch + 1, dtype=torch.int32) * case.context).to(device)
    shape = (case.batch * case.context, case.heads[1], case.dim)
    k, v = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in "kv")
    table = {"block_table": batch.block_table, "cu_seqlens_k": sums, "out_k": k, "out_v": v}

    def attend(i: int) -> torch.Tensor:
        ops.gather_kv(pool.layer(batch.page, i), cache_seqlens=batch.cache_seqlens, **table)
        return ops.masked_attention(q, k, v, cu_seqlens_q=batch.cu_seqlens_q, cu_seqlens_k=sums)

    # What the write leaves of the new tokens: of the first set, whose result is compared.
    everything = batch.cache_seqlens + case.queries
    ops.gather_kv(pool.layer(batch.page, 0), cache_seqlens=everything, **table)
    return [partial(attend, i) for i in range(pool.sets)]


def append_calls(
    case: Case, pool: Pool, batch: Batch, q: torch.Tensor
) -> list[Callable[[], torch.Tensor]]:
    """paged_attention over the prefix and the new tokens."""
    del case
    layers = [pool.layer(batch.page, i) for i in range(pool.sets)]
    return [partial(ops.paged_attention, q, layer, **batch.meta) for layer in layers]


def add_peers(
    found: Report,
    where: str,
    contenders: dict[str, Any],
    pool: Pool,
    batch: Batch,
    q: torch.Tensor,
    want: Any,
) -> None:
    """FlashInfer's paged prefill, whose FA3 takes 16 bits alone."""
    for backend in ("fa3", "fa2") if pool.format.bits == 16 else ("fa2",):
        name, bound = f"FlashInfer {backend.upper()}", AGREE[pool.format.bits]
        make = partial(peers.paged_prefill, pool, batch, q, backend)
        peers.add(found, contenders, where, name, make, want, bound)


if __name__ == "__main__":
    main()
