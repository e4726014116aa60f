# SPDX-License-Identifier: Apache-2.0
"""gather_kv on a GPU against torch.compile's gather and dequantization of the same format.

    python benchmarks/bench_gather.py --json benchmarks/results/gather.json

K and V both, pages in random order. The peer reads a cache with heads behind tokens, which spares
it a transposition, and returns new tensors; fastkv writes the tensors that it is given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastkv import ops
from gpu import compiled, report
from gpu.data import Batch, Format, Pool
from gpu.report import OWN, Report
from gpu.timing import Timer, Timing, rotations

OP = "gather_kv"
PEER = "torch.compile"


@dataclass(frozen=True, slots=True)
class Case:
    """One request's prefix."""

    tokens: int
    heads: int = 8
    dim: int = 128

    def shape(self, page: int) -> str:
        """As the row names it."""
        return f"{self.tokens} tokens Hkv{self.heads} D{self.dim} P{page}"

    def bytes_moved(self, fmt: Format) -> int:
        """The cache read, K and V written as bf16."""
        read = Pool.bytes_per_token_of(fmt, self.heads, self.dim)
        return self.tokens * (read + 2 * 2 * self.heads * self.dim)


CASES = [Case(128), Case(8192), Case(65536)]


def main(
    argv: list[str] | None = None,
    timer: Timer | None = None,
    device: str = "cuda",
    cases: list[Case] | None = None,
) -> Report:
    """Run from a command line; the other arguments are for tests without a GPU."""
    arguments = report.parser(__doc__).parse_args(argv)
    found = report.start("bench_gather", arguments, timer, device, kernels=[OP])
    return found.run(CASES if cases is None else cases, run_case)


def run_case(found: Report, case: Case) -> None:
    """All rows of a case, written after each format."""
    for fmt in found.formats:
        run(found, case, fmt)
        found.write()


def run(found: Report, case: Case, fmt: Format) -> None:
    """The rows of one case and format, at every page size."""
    pages = [page for page in found.pages if found.wants(case.shape(page))]
    where = f"{OP} {fmt.label} {case.tokens}"
    if not pages:
        return
    sets = rotations(case.bytes_moved(fmt), found.device)
    pool = found.attempt(
        where,
        partial(Pool.random, fmt, case.heads, case.dim, case.tokens, sets, found.device),
    )
    if pool is None:
        return
    outputs = [make_output(case, found.device) for _ in range(sets)]
    contenders: dict[str, Any] = {}
    for page in found.pages:
        batch = Batch.make(1, 0, case.tokens, page, found.device)
        own = own_calls(pool, batch, outputs)
        good = found.attempt(f"{where} {OWN} P{page}", lambda call=own[0]: call() or True)
        if good and page in pages:
            contenders[f"{OWN} P{page}"] = own
        if found.with_peers:
            make = partial(peer_calls, fmt, pool, batch)
            calls = found.attempt(f"{where} {PEER} P{page}", make)
            if calls:
                check(found, calls[0], outputs[0], compare=bool(good))
                contenders[f"{PEER} P{page}"] = calls
    add_rows(found, case, fmt, pages, found.measure(contenders, where))
    if found.device.type == "cuda":
        torch.cuda.empty_cache()


def make_output(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (case.tokens, case.heads, case.dim)
    k, v = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in "kv")
    return k, v


def own_calls(
    pool: Pool, batch: Batch, outputs: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[Callable[[], None]]:
    cu_seqlens_k = torch.tensor([0, batch.context], dtype=torch.int32).to(pool.k.device)
    return [
        partial(
            ops.gather_kv,
            pool.layer(batch.page, i),
            cache_seqlens=batch.cache_seqlens,
            block_table=batch.block_table,
            cu_seqlens_k=cu_seqlens_k,
            out_k=out_k,
            out_v=out_v,
        )
        for i, (out_k, out_v) in enumerate(outputs)
    ]


def peer_calls(fmt: Format, pool: Pool, batch: Batch) -> list[Callable[[], Any]]:
    function = compiled.gather(fmt, pool)
    if pool.k.device.type == "cuda":  # the compiler for the CPU is not what is measured
        torch._dynamo.reset()  # PyTorch gives up on a function after a few recompilations
        function = torch.compile(function, dynamic=False)
    table = batch.block_table[0].long()
    sets = [compiled.nhd(pool, batch.page, i) for i in range(pool.sets)]
    calls = [partial(function, *tensors, table) for tensors in sets]
    calls[0]()
    return calls


def check(
    found: Report,
    call: Callable[[], Any],
    output: tuple[torch.Tensor, torch.Tensor],
    *,
    compare: bool,
) -> None:
    """Both read the same values, up to one rounding to bf16."""
    if not compare:
        return
    for got, want in zip(call(), output, strict=True):
        found.compare(PEER, got, want, 0.005)


def add_rows(
    found: Report, case: Case, fmt: Format, pages: list[int], times: dict[str, Timing]
) -> None:
    figures = {name: time for name, time in times.items() if name.startswith(PEER)}
    for page in pages:
        own = times.get(f"{OWN} P{page}")
        if own is not None:
            found.add(OP, fmt.label, case.shape(page), own, case.bytes_moved(fmt), figures)


if __name__ == "__main__":
    main()
