# SPDX-License-Identifier: Apache-2.0
"""rope_write_kv on a GPU against FlashInfer's appends and against a plain copy.

    python benchmarks/bench_write.py --json benchmarks/results/write.json

fastkv splits qkv, rotates q and k, quantizes and scatters, and writes q as bf16. FlashInfer's
fused op does the same to an fp8 cache from q, k and v that were split before, and writes q as
fp8, fewer bytes; it needs its index kernel before it, which is timed with it at 128 tokens. Its
plain append only copies K and V (`none`); it stands beside the rows and is no peer of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastkv import Rope, ops
from gpu import ceilings, peers, report
from gpu.data import FORMATS, Batch, Format, Pool, relative_difference
from gpu.report import OWN, Report
from gpu.timing import Timer, Timing, rotations

OP = "rope_write_kv"
HQ, HKV, D = 32, 8, 128
FUSED = "rope_quantize_fp8_append"
APPEND = "append (copies K and V)"
WITH_INDEX = f"{FUSED} + index"
# Up to this many tokens the index kernel is timed with the fused op.
INDEX_UP_TO = 128


@dataclass(frozen=True, slots=True)
class Case:
    """A batch of requests without anything cached before."""

    requests: int
    tokens: int
    heads: tuple[int, int] = (HQ, HKV)
    dim: int = D

    def shape(self, page: int) -> str:
        """As the row names it."""
        query_heads, heads = self.heads
        return f"{self.requests}x{self.tokens} Hq{query_heads} Hkv{heads} D{self.dim} P{page}"

    @property
    def total(self) -> int:
        """T."""
        return self.requests * self.tokens

    def bytes_moved(self, fmt: Format) -> int:
        """What the op must move: qkv read, q and cache written."""
        query_heads, heads = self.heads
        activations = 2 * self.dim * (2 * query_heads + 2 * heads)
        return self.total * (activations + Pool.bytes_per_token_of(fmt, heads, self.dim))


CASES = [Case(1, 128), Case(1, 8192), Case(1, 65536), Case(8, 1024)]


@dataclass(slots=True)
class Inputs:
    """Of one case and format; `qkv` has one entry a set."""

    pool: Pool
    qkv: list[torch.Tensor]
    rope: Rope


def main(
    argv: list[str] | None = None,
    timer: Timer | None = None,
    device: str = "cuda",
    cases: list[Case] | None = None,
) -> Report:
    """Run from a command line; the other arguments are for tests without a GPU."""
    arguments = report.parser(__doc__).parse_args(argv)
    found = report.start("bench_write", arguments, timer, device, kernels=[OP])
    return found.run(CASES if cases is None else cases, run_case)


def run_case(found: Report, case: Case) -> None:
    """Everything of one case takes turns: every format, the peers, the copies."""
    pages = [page for page in found.pages if found.wants(case.shape(page))]
    if not pages:
        return
    contenders: dict[str, Any] = {}
    for fmt in found.formats:
        contenders |= own_contenders(found, case, fmt, pages)
    if found.with_peers:
        for page in found.pages:
            contenders |= peer_contenders(found, case, page)
    if found.device.type == "cuda":
        contenders |= copy_contenders(found, case)
    add_rows(found, case, pages, found.measure(contenders, f"{OP} {case.shape(pages[0])}"))
    del contenders
    if found.device.type == "cuda":
        torch.cuda.empty_cache()


def add_rows(found: Report, case: Case, pages: list[int], times: dict[str, Timing]) -> None:
    beside = {name: time.us for name, time in times.items() if not name.startswith(OWN)}
    copies = [us for name, us in beside.items() if name.startswith("copy")]
    more: dict[str, Any] = {"beside": beside}
    if copies:
        more["copy_TBps"] = 2 * copied(case) / min(copies) / 1e6
    peer = governing(case, times)
    for fmt in found.formats:
        for page in pages:
            own = times.get(f"{OWN} {fmt.label} P{page}")
            if own is not None:
                size = case.bytes_moved(fmt)
                found.add(OP, fmt.label, case.shape(page), own, size, peer, **more)


def governing(case: Case, figures: dict[str, Timing]) -> dict[str, Timing]:
    """The figures that count: the fused op, with its index kernel where that is short.

    The index kernel gives each request to one block, so for one long request it would take as long
    as the op itself; leaving it out there favours the peer.
    """
    wanted = WITH_INDEX if case.total <= INDEX_UP_TO else FUSED
    return {name: time for name, time in figures.items() if name.rpartition(" ")[0] == wanted}


def make_inputs(found: Report, case: Case, fmt: Format) -> Inputs:
    device, (query_heads, heads) = found.device, case.heads
    sets = rotations(case.bytes_moved(fmt), device)
    pool = Pool.random(fmt, heads, case.dim, case.total, sets, device)
    width = (query_heads + 2 * heads) * case.dim
    qkv = [torch.randn(case.total, width, device=device, dtype=torch.bfloat16) for _ in range(sets)]
    return Inputs(pool, qkv, make_rope(case, device))


def make_rope(case: Case, device: torch.device) -> Rope:
    host = Rope.from_theta(10000.0, rotary_dim=case.dim, max_len=case.tokens)
    cos, sin = (torch.from_numpy(x).to(device) for x in (host.cos, host.sin))
    return Rope(cos, sin)


def own_contenders(
    found: Report, case: Case, fmt: Format, pages: list[int]
) -> dict[str, list[Callable[[], Any]]]:
    where = f"{OP} {fmt.label} {case.shape(pages[0])}"
    inputs = found.attempt(where, partial(make_inputs, found, case, fmt))
    contenders = {}
    for page in pages if inputs is not None else ():
        batch = Batch.make(case.requests, case.tokens, case.tokens, page, found.device)
        calls = own_calls(inputs, batch)
        if found.attempt(f"{where} {OWN} P{page}", calls[0]) is not None:
            contenders[f"{OWN} {fmt.label} P{page}"] = calls
    return contenders


def own_calls(inputs: Inputs, batch: Batch) -> list[Callable[[], torch.Tensor]]:
    layers = [inputs.pool.layer(batch.page, i) for i in range(inputs.pool.sets)]
    return [
        lambda x=x, layer=layer: ops.rope_write_kv(x, layer, **batch.meta, rope=inputs.rope)
        for x, layer in zip(inputs.qkv, layers, strict=True)
    ]


def peer_contenders(found: Report, case: Case, page: int) -> dict[str, Any]:
    """FlashInfer's three at one page size."""
    contenders = {}
    for fmt, names in (("none", (APPEND,)), ("cache_fp8", (FUSED, WITH_INDEX))):
        where = f"{names[0]} {case.shape(page)}"
        calls = found.attempt(where, partial(peer_calls, found, case, FORMATS[fmt], page))
        for name, own in zip(names, calls or (), strict=False):
            contenders[f"{name} P{page}"] = own
    return contenders


def peer_calls(found: Report, case: Case, fmt: Format, page: int) -> tuple[list[Any], ...]:
    """The calls of the append, or of the fused op without and with its index kernel."""
    inputs = make_inputs(found, case, fmt)
    batch = Batch.make(case.requests, case.tokens, case.tokens, page, found.device)
    run_index, index = peers.index_kernel(batch, case.total)
    sets = [split(case, inputs, i, page) for i in range(inputs.pool.sets)]
    if fmt.quant.storage is None:
        return ([peers.append(x, batch, index) for x in sets],)
    table = torch.cat([inputs.rope.cos, inputs.rope.sin], dim=1)
    scale = 1 / fmt.multipliers[0]
    calls = [peers.rope_append(x, batch, index, table, scale, index[1]) for x in sets]
    check(found, inputs, batch, sets[0], calls[0])

    def both(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            run_index()
            call()

        return run

    return calls, [both(call) for call in calls]


def split(case: Case, inputs: Inputs, i: int, page: int) -> peers.AppendInputs:
    query_heads, heads = case.heads
    q, k, v = inputs.qkv[i].view(case.total, -1, case.dim).split([query_heads, heads, heads], 1)
    shape = (-1, page, heads, case.dim)
    caches = [inputs.pool.layer(page, i).k.reshape(shape).clone() for _ in "kv"]
    return peers.AppendInputs(q.contiguous(), k.contiguous(), v.contiguous(), *caches)


def check(
    found: Report, inputs: Inputs, batch: Batch, first: peers.AppendInputs, call: Callable[[], Any]
) -> None:
    """Both write the same cache: the peer's one scale is the pool's K multiplier for K and V."""
    call()
    layer = inputs.pool.layer(batch.page, 0)
    try:
        own_calls(inputs, batch)[0]()
    except Exception as error:
        found.failed(f"{OP} for the comparison with {FUSED}", error)
        return
    off = relative_difference(first.k_cache.transpose(1, 2), layer.k)
    if not off < 0.02:
        found.failed(FUSED, ValueError(f"its K differs from fastkv's by {off:.3g} of the norm"))


def copied(case: Case) -> int:
    """Bytes that a copy reads, and writes, to move what the op does at 8 bits."""
    return case.bytes_moved(FORMATS["cache_fp8"]) // 2 // 16 * 16


def copy_contenders(found: Report, case: Case) -> dict[str, Any]:
    """Copies of the op's size, rotated alike: what is possible at this size."""
    half = copied(case)
    pairs = [
        [torch.empty(half, dtype=torch.uint8, device=found.device).random_() for _ in range(2)]
        for _ in range(rotations(2 * half, found.device))
    ]
    contenders: dict[str, Any] = {"copy": [partial(b.copy_, a) for a, b in pairs]}
    kernels = found.attempt(
        "copy kernel", lambda: [ceilings.copy_kernel(a, b, 4) for a, b in pairs]
    )
    if kernels:
        contenders["copy kernel"] = kernels
    return contenders


if __name__ == "__main__":
    main()
