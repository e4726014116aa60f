# SPDX-License-Identifier: Apache-2.0
"""masked_attention on a GPU against FlashInfer, cuDNN and FlexAttention.

    python benchmarks/bench_prefill.py --json benchmarks/results/prefill.json

bf16, contiguous K and V. A row's columns are the two paths of the kernel: the device's own, and
`mma.sync`, which other devices take, on the same card. TFLOP/s count the pairs of a query row and
a key that it sees, four operations each an element of D.
"""

import argparse
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from fastkv import ops
from gpu import peers, prefill_peers, report, warm
from gpu.peers import Peer
from gpu.prefill_peers import Triple
from gpu.report import OWN, Report
from gpu.timing import Timer, Timing, rotations

OP = "masked_attention"
PATHS = ("wgmma", "mma.sync")
AGREE = 0.02  # of the norm: both round to bf16


@dataclass(frozen=True, slots=True)
class Case:
    """One row: requests of these lengths, and what a row sees."""

    lengths: tuple[int, ...]
    mask: str = "causal"
    heads: tuple[int, int] = (32, 8)
    dim: int = 128

    @property
    def shape(self) -> str:
        """As the row names it."""
        query_heads, heads = self.heads
        what = f"{self.lengths[0]}"
        if len(self.lengths) > 1:
            what = f"{len(self.lengths)} of {min(self.lengths)} to {max(self.lengths)}"
        return f"{what} {self.mask} Hq{query_heads} Hkv{heads} D{self.dim}"

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def start(self) -> torch.Tensor | None:
        """The first key that each row sees, where that is told as intervals."""
        rows = torch.arange(self.tokens)
        if self.mask == "window 1024 as intervals":
            return (rows - 1023).clamp(min=0)
        if self.mask == "16 documents as intervals":
            generator = torch.Generator().manual_seed(1)
            cuts = torch.randperm(self.tokens - 1, generator=generator)[:15].sort().values + 1
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), cuts])
            return starts[torch.bucketize(rows, cuts, right=True)]
        return torch.zeros_like(rows) if self.mask == "causal as intervals" else None

    @property
    def flops(self) -> int:
        """Of the pairs that are seen."""
        start = self.start()
        if start is not None:
            pairs = int((torch.arange(self.tokens) + 1 - start).sum())
        elif self.mask == "causal":
            pairs = sum(n * (n + 1) // 2 for n in self.lengths)
        else:
            pairs = sum(n * n for n in self.lengths)
        return 4 * pairs * self.heads[0] * self.dim

    @property
    def bytes_moved(self) -> int:
        """q, K and V read once, the result written."""
        return 2 * 2 * self.tokens * sum(self.heads) * self.dim


def varlen() -> tuple[int, ...]:
    """64 requests of 16 to 4096 tokens, most of them short."""
    generator = torch.Generator().manual_seed(2)
    between = torch.rand(62, generator=generator) * 8
    return (16, *(int(16 * 2**x) for x in between.tolist()), 4096)


LENGTHS = (1024, 4096, 16384)
CASES = [
    *(Case((n,), mask) for mask in ("causal", "full") for n in LENGTHS),
    *(Case((4096,), mask, dim=dim) for dim in (64, 256) for mask in ("causal", "full")),
    Case(varlen()),
    Case((16384,), "causal as intervals"),
    Case((16384,), "window 1024 as intervals"),
    Case((16384,), "16 documents as intervals"),
]


def main(
    argv: list[str] | None = None,
    timer: Timer | None = None,
    device: str = "cuda",
    cases: list[Case] | None = None,
) -> Report | None:
    """Run from a command line; the other arguments are for tests without a GPU."""
    arguments = parse(argv)
    if arguments.warm_one:
        warm.prefill_modules()[arguments.warm_one]()
        return None
    found = report.start("bench_prefill", arguments, timer, device, kernels=[OP])
    if arguments.warm:
        warm.build(list(warm.prefill_modules()), ["benchmarks/bench_prefill.py"])
        return found
    return found.run(CASES if cases is None else cases, run)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__)
    warm.add_arguments(parser)
    return parser.parse_args(argv)


def run(found: Report, case: Case) -> None:
    """The row of one case, for each path of the kernel."""
    if not found.wants(case.shape):
        return
    sets = inputs(case, rotations(case.bytes_moved, found.device), found.device)
    contenders: dict[str, Any] = {}
    want = None
    for path in PATHS if found.device.type == "cuda" else PATHS[1:]:
        calls = own_calls(case, sets, path)
        with forced(path):  # the first call of a kind decides
            got = found.attempt(f"{case.shape} {OWN} {path}", calls[0])
        if got is not None:
            want = got if want is None else want
            contenders[f"{OWN} {path}"] = calls
    for name, make in peers_of(case, sets) if found.with_peers else ():
        peers.add(found, contenders, case.shape, name, make, want, AGREE)
    add_rows(found, case, found.measure(contenders, case.shape))
    if found.device.type == "cuda":
        torch.cuda.empty_cache()


def inputs(case: Case, sets: int, device: torch.device) -> list[Triple]:
    query_heads, heads = case.heads

    def tensor(count: int) -> torch.Tensor:
        return torch.randn(case.tokens, count, case.dim, device=device, dtype=torch.bfloat16)

    return [(tensor(query_heads), tensor(heads), tensor(heads)) for _ in range(sets)]


def own_calls(case: Case, sets: list[Triple], path: str) -> list[Callable[[], torch.Tensor]]:
    """`mma.sync` writes a given tensor: a call of another kind, with a plan of its own."""
    device = sets[0][0].device
    sums = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32, device=device)
    options: dict[str, Any] = {"cu_seqlens_q": sums, "cu_seqlens_k": sums}
    start = case.start()
    if start is not None:
        rows = torch.arange(case.tokens)
        intervals = torch.stack([start, rows + 1], dim=1).int().to(device)
        options |= {"mask_offsets": intervals, "causal": False}
    elif case.mask == "full":
        options["causal"] = False
    if path == PATHS[0]:
        return [partial(ops.masked_attention, *x, **options) for x in sets]
    out = torch.empty_like(sets[0][0])
    return [partial(ops.masked_attention, *x, **options, out=out) for x in sets]


def forced(path: str) -> AbstractContextManager[Any]:
    """Plans that are made here take this path of the kernel, whatever the device has."""
    from fastkv.ops.cuda import masked_attention as launcher
    from fastkv.ops.cuda.masked_shape import Shape

    def of(dim: int, arch: str) -> Shape:
        return Shape.of(dim, arch if path == PATHS[0] else "sm_80")

    return patch.object(launcher, "Shape", SimpleNamespace(of=of))


def peers_of(case: Case, sets: list[Triple]) -> Iterable[tuple[str, Callable[[], Peer]]]:
    """Who computes the same, by name."""
    start, causal = case.start(), case.mask == "causal"
    if start is not None:
        on_device = start.to(sets[0][0].device)
        yield "FlexAttention", lambda: prefill_peers.flex(sets, on_device)
        return
    backends = ("fa3", "fa2") if case.dim == 128 else ("fa3",)
    for backend in backends:
        name = f"FlashInfer {backend.upper()}"
        if len(case.lengths) > 1:
            ragged = partial(prefill_peers.flashinfer_ragged, sets, case.lengths, causal)
            yield f"{name} ragged", partial(ragged, backend)
        else:
            yield name, partial(prefill_peers.flashinfer_single, sets, causal, backend)
    if len(case.lengths) == 1:
        yield "cuDNN", lambda: prefill_peers.cudnn(sets, causal)


def add_rows(found: Report, case: Case, times: dict[str, Timing]) -> None:
    """A row a path: the device's own against the best peer, `mma.sync` against FA2, its like."""
    others = {name: time for name, time in times.items() if not name.startswith(OWN)}
    like = {
        name: time for name, time in others.items() if name.startswith(("FlashInfer FA2", "Flex"))
    }
    for path in PATHS:
        own = times.get(f"{OWN} {path}")
        if own is not None:
            against = others if path == PATHS[0] else like
            rate = {"TFLOPs": case.flops / own.us / 1e6}
            found.add(OP, path, case.shape, own, case.bytes_moved, against, **rate)


if __name__ == "__main__":
    main()
