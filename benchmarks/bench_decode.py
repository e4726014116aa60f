# SPDX-License-Identifier: Apache-2.0
"""paged_attention on a GPU against FlashInfer: decode, draft tokens, chunked prefill.

    python benchmarks/bench_decode.py --json benchmarks/results/decode.json

From the root of a checkout (PYTHONPATH=. if fastkv is not installed). Peer and fastkv read the
same keys and values through the same shuffled block table, in one process, interleaved. A peer
is measured at page 16 and 64, and every row of fastkv is held against its best figure. FlashInfer
compiles its modules at first use; `--warm` does that ahead, several at once.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastkv import ops
from gpu import peers, report, warm
from gpu.data import FORMATS, Batch, Format, Pool
from gpu.report import OWN, Report
from gpu.timing import Timer, Timing, rotations

OP = "paged_attention"
# The peer's result may differ by this much of the norm: rounding to bf16, or XQA's e4m3 q and P.
AGREE = {16: 0.02, 8: 0.10}


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes of one row; `context` counts the new tokens too."""

    batch: int
    context: int
    heads: tuple[int, int] = (32, 8)
    dim: int = 128
    queries: int = 1
    window: int | None = None
    pages: tuple[int, ...] | None = None
    anchor: bool = False

    def shape(self, page: int) -> str:
        """As the row names it."""
        rows = f"{self.batch}x{self.context}"
        if self.queries > 1:
            rows = f"{self.batch}x{self.queries} over {self.context}"
        query_heads, heads = self.heads
        text = f"{rows} Hq{query_heads} Hkv{heads} D{self.dim} P{page}"
        return text if self.window is None else f"{text} W{self.window}"

    @property
    def keys_read(self) -> int:
        """Keys that the op must read, of one request."""
        if self.window is None:
            return self.context
        return min(self.context, self.window + self.queries - 1)

    @property
    def flops(self) -> int:
        """Of the two matrix products, over the pairs that causality lets through."""
        pairs = self.queries * self.context - self.queries * (self.queries - 1) // 2
        return 4 * self.batch * self.heads[0] * self.dim * pairs


SIZES = ((1, 8192), (1, 131072), (16, 4096), (64, 8192), (256, 2048))
DECODE = [Case(b, n, heads, anchor=True) for heads in ((32, 8), (8, 1)) for b, n in SIZES]
QUERIES = [
    Case(64, 8192, queries=4, anchor=True),
    Case(64, 8192, queries=8, anchor=True),
    Case(8, 8192, queries=512, anchor=True),
    Case(1, 16384, queries=2048, anchor=True),
]
SHAPES = [
    *(Case(64, 8192, dim=dim) for dim in (64, 96, 256)),
    *(Case(64, 8192, (8 * group, 8)) for group in (1, 7, 16)),
    Case(64, 8192, pages=(128,)),
    Case(64, 1024),
    Case(64, 8192, window=1024),
]
CASES = [*DECODE, *QUERIES, *SHAPES]


def main(
    argv: list[str] | None = None,
    timer: Timer | None = None,
    device: str = "cuda",
    cases: list[Case] | None = None,
) -> Report | None:
    """Run from a command line; the other arguments are for tests without a GPU."""
    arguments = parse(argv)
    if arguments.warm_one:
        warm.modules(report.PAGES)[arguments.warm_one]()
        return None
    found = report.start("bench_decode", arguments, timer, device, kernels=[OP])
    if arguments.warm:
        prepare(found)
        return found
    return found.run(CASES if cases is None else cases, run_case)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__)
    warm.add_arguments(parser)
    parser.add_argument("--save-modules", type=Path, help="with --warm: pack what was built")
    return parser.parse_args(argv)


def prepare(found: Report) -> None:
    """Build what the peers need, at once; a module that fails will fail again in its row."""
    names = [
        name
        for name in warm.modules(found.pages, drafts=not found.arguments.quick)
        if found.wants(name)
    ]
    warm.build(names, ["benchmarks/bench_decode.py"])
    if found.arguments.save_modules:
        warm.save(found.arguments.save_modules)


def run_case(found: Report, case: Case) -> None:
    """All rows of a case."""
    pages = case.pages or found.pages
    if found.arguments.quick and not case.anchor:
        return
    if not any(found.wants(case.shape(page)) for page in pages):
        return
    figures: dict[str, dict[str, Timing]] = {}
    # Formats that a peer reads come first: the others are held against its figures of 8 bits.
    for fmt in sorted(found.formats, key=lambda fmt: peer_format(fmt) != fmt.label):
        name = peer_format(fmt)
        here = found.with_peers and case.anchor and name not in figures
        if here and name != fmt.label:  # its own format was not asked for
            figures[name] = peer_figures(
                run_format(found, case, FORMATS[name], pages, with_peers=True, with_own=False)
            )
            here = False
        times = run_format(found, case, fmt, pages, with_peers=here)
        if here:
            figures[name] = peer_figures(times)
        add_rows(found, case, fmt, pages, times, figures.get(name, {}))
        if found.device.type == "cuda":
            torch.cuda.empty_cache()


def peer_figures(times: dict[str, Timing]) -> dict[str, Timing]:
    """The peers among the contenders."""
    return {name: time for name, time in times.items() if not name.startswith(OWN)}


def peer_format(fmt: Format) -> str:
    """The format of the peer's figures: the same bits, or fp8 for what no peer has."""
    return "none" if fmt.bits == 16 else "cache_fp8"


def run_format(
    found: Report,
    case: Case,
    fmt: Format,
    pages: tuple[int, ...],
    *,
    with_peers: bool,
    with_own: bool = True,
) -> dict[str, Timing]:
    """Times of fastkv at every page size and of the peers, all over one pool; by name."""
    where = f"{fmt.label} {case.shape(pages[0])}"
    prepared = found.attempt(where, partial(inputs, found, case, fmt))
    if prepared is None:
        return {}
    pool, q = prepared
    contenders: dict[str, Any] = {}
    for page in pages:
        batch = Batch.make(case.batch, case.queries, case.context, page, found.device)
        want = None
        if with_own and found.wants(case.shape(page)):
            own = own_calls(case, pool, batch, q)
            want = found.attempt(f"{where} {OWN} P{page}", own[0])
            if want is not None:
                contenders[f"{OWN} P{page}"] = own
        if with_peers:
            add_peers(found, where, contenders, pool, batch, q, want)
    return found.measure(contenders, where)


def inputs(found: Report, case: Case, fmt: Format) -> tuple[Pool, torch.Tensor]:
    heads = case.heads[1]
    tokens = case.batch * case.context
    read = case.batch * case.keys_read * heads * case.dim * fmt.bits // 4
    pool = Pool.random(fmt, heads, case.dim, tokens, rotations(read, found.device), found.device)
    shape = (case.batch * case.queries, case.heads[0], case.dim)
    return pool, torch.randn(shape, device=found.device, dtype=torch.bfloat16)


def own_calls(
    case: Case, pool: Pool, batch: Batch, q: torch.Tensor
) -> list[Callable[[], torch.Tensor]]:
    layers = [pool.layer(batch.page, i) for i in range(pool.sets)]
    return [
        lambda layer=layer: ops.paged_attention(q, layer, **batch.meta, window=case.window)
        for layer in layers
    ]


def add_peers(
    found: Report,
    where: str,
    contenders: dict[str, Any],
    pool: Pool,
    batch: Batch,
    q: torch.Tensor,
    want: torch.Tensor | None,
) -> None:
    """Add the peers of one page size whose result is fastkv's; a result that is not is told."""
    for name, make in peers.decode_peers(pool, batch, q):
        label, bound = f"{name} P{batch.page}", AGREE[pool.format.bits]
        peers.add(found, contenders, where, label, make, want, bound)


def add_rows(
    found: Report,
    case: Case,
    fmt: Format,
    pages: tuple[int, ...],
    times: dict[str, Timing],
    figures: dict[str, Timing],
) -> None:
    """One row a page size, against the best figure of the peers at any page size."""
    token_bytes = Pool.bytes_per_token_of(fmt, case.heads[1], case.dim)
    for page in pages:
        own = times.get(f"{OWN} P{page}")
        if own is None:
            continue
        more: dict[str, Any] = {}
        if case.queries > 1:
            more["TFLOPs"] = case.flops / own.us / 1e6
        size = case.batch * case.keys_read * token_bytes
        found.add(OP, fmt.label, case.shape(page), own, size, figures, **more)


if __name__ == "__main__":
    main()
