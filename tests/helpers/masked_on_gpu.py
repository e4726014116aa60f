# SPDX-License-Identifier: Apache-2.0
"""Batches of `masked_attention` on a GPU, and attention over them in float64 beside a plain run.

A specialization takes seconds to compile, so the tests share a few: `CASES`.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest

from fastkv import ops
from helpers.compare import ROUNDING
from helpers.torch_oracle import attended

DEVICE = "cuda:0"
_BLOCK = 64  # query rows whose errors are compared as one
# Sums of exact weights and products in float32, truncated by tensor cores: far below what one key
# of some thousands contributes, far above what was ever seen.
_LSE = 5e-4


class Case(NamedTuple):
    """A specialization and the heads that share it."""

    head_dim: int
    dtype: str
    kv_heads: int
    group: int


CASES = (
    Case(128, "bfloat16", 2, 4),
    Case(128, "float16", 1, 8),
    Case(64, "float16", 2, 3),
    Case(64, "bfloat16", 1, 16),
    Case(96, "bfloat16", 3, 1),
    Case(96, "float16", 1, 4),
    Case(256, "bfloat16", 1, 3),
    Case(256, "float16", 2, 8),
)


def case_name(case):
    return "-".join(map(str, case))


every_case = pytest.mark.parametrize("case", CASES, ids=case_name)
# One of each head dim and one more, of both dtypes.
some_cases = pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 5, 6, 1)], ids=case_name)

# Query rows and keys of each request.
MIXED = [(1, 1), (129, 300), (64, 64), (0, 7), (700, 1000), (33, 20), (1, 515), (128, 128)]
OPTIONS = {
    "window of one": {"window": 1},
    "window": {"window": 29},
    "window of a tile": {"window": 128},
    "wide window": {"window": 300},
    "huge window": {"window": 2**40},
    "soft_cap": {"soft_cap": 0.7},
    "sinks": {"sinks": True},
    "intervals": {"mask_offsets": True},
    "scale": {"scale": 0.2},
    "negative scale": {"scale": -0.1},
    "full and a window": {"causal": False, "window": 40},
    "full and intervals": {"causal": False, "mask_offsets": True},
    "capped, sinks, intervals": {"soft_cap": 2.0, "sinks": True, "mask_offsets": True},
    "all": {"window": 200, "soft_cap": 3.0, "sinks": True, "mask_offsets": True, "scale": 0.15},
}


@dataclass(frozen=True)
class Batch:
    """Contiguous requests, with rows of nobody, which hold NaN, before and behind them.

    Attributes:
        q: `[T, Hq, D]`.
        k: `[Tk, Hkv, D]`.
        v: `[Tk, Hkv, D]`.
        cu_seqlens_q: on the host, `B + 1` numbers.
        cu_seqlens_k: likewise.
    """

    q: Any
    k: Any
    v: Any
    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]

    def requests(self):
        """Rows and keys of each request, as slices."""
        rows, keys = (
            [slice(*pair) for pair in pairwise(sums)]
            for sums in (self.cu_seqlens_q, self.cu_seqlens_k)
        )
        return list(zip(rows, keys, strict=True))

    def sums(self):
        return {
            "cu_seqlens_q": int32(self.cu_seqlens_q),
            "cu_seqlens_k": int32(self.cu_seqlens_k),
        }

    def part(self, order, mask_offsets=None):
        """The batch of some of its requests, their intervals, and where their rows were."""
        import torch

        own = [self.requests()[b] for b in order]
        rows, keys = ([pair[side] for pair in own] for side in (0, 1))
        places = torch.cat([torch.arange(s.start, s.stop) for s in rows]).to(DEVICE)
        found = [torch.cat([x[s] for s in keys]) for x in (self.k, self.v)]
        part = Batch(self.q[places], *found, running(rows), running(keys))
        return part, None if mask_offsets is None else mask_offsets[places], places


def running(slices):
    """The running sum of their lengths."""
    sums = [0]
    for one in slices:
        sums.append(sums[-1] + one.stop - one.start)
    return tuple(sums)


def int32(values):
    import torch

    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def dtype_of(name):
    import torch

    return getattr(torch, name)


def normal(seed, shape, dtype="float32"):
    import torch

    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    made = torch.randn(shape, generator=generator, device=DEVICE)
    return made.to(dtype_of(dtype))


def make(case, requests, *, seed=7, before=0, behind=0):
    """A batch of `(query rows, keys)` a request; so many rows of nobody on either side."""
    slices = [[slice(0, pair[side]) for pair in requests] for side in (0, 1)]
    cu_q, cu_k = (tuple(before + at for at in running(side)) for side in slices)
    dim, dtype = case.head_dim, case.dtype
    q = normal(seed, (cu_q[-1] + behind, case.kv_heads * case.group, dim), dtype)
    k = normal(seed + 1, (cu_k[-1] + behind, case.kv_heads, dim), dtype)
    v = normal(seed + 2, (cu_k[-1] + behind, case.kv_heads, dim), dtype)
    for x in (q, k, v):
        x[:before] = float("nan")
        x[len(x) - behind :] = float("nan")
    return Batch(q, k, v, cu_q, cu_k)


def intervals(batch, seed=3, empty=0.2):
    """Random intervals `[T, 2]`, such a share of them empty; nonsense in rows of nobody."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = torch.tensor([[9, -2]], dtype=torch.int32).repeat(len(batch.q), 1)
    for rows, keys in batch.requests():
        length, count = keys.stop - keys.start, rows.stop - rows.start
        ends = torch.randint(0, length + 1, (count, 2), generator=generator).sort(dim=1).values
        nothing = torch.rand(count, generator=generator) < empty
        ends[nothing] = ends[nothing][:, 1:]
        made[rows] = ends.int()
    return made.to(DEVICE)


def same_for_all(batch, of):
    """Intervals of every row, `of(keys of its request)`."""
    offsets = np.zeros((len(batch.q), 2), np.int32)
    for rows, keys in batch.requests():
        offsets[rows] = of(keys.stop - keys.start)
    return int32(offsets.tolist())


def options_of(batch, asked):
    """Options with sinks and intervals made for the batch, where they are asked for by True."""
    made = dict(asked)
    if asked.get("sinks") is True:
        made["sinks"] = 2 * normal(5, (batch.q.shape[1],))
    if asked.get("mask_offsets") is True:
        made["mask_offsets"] = intervals(batch)
    return made


def run(batch, **options):
    """Out and LSE of the op; `out` is poisoned where the caller gives none."""
    import torch

    out = options.pop("out", None)
    out = torch.full_like(batch.q, float("nan")) if out is None else out
    got, lse = ops.masked_attention(
        batch.q, batch.k, batch.v, **batch.sums(), out=out, return_lse=True, **options
    )
    assert got is out
    return got, lse


# --- comparisons ------------------------------------------------------------------------------


def blocks_of(batch):
    """Each row's block of rows of one request, and 0 for rows of nobody; how many there are."""
    import torch

    found, last = torch.zeros(len(batch.q), dtype=torch.int64), 0
    for rows, _ in batch.requests():
        n = rows.stop - rows.start
        found[rows] = last + 1 + torch.arange(n) // _BLOCK
        last += -(-n // _BLOCK)
    return found.to(DEVICE), last + 1


def largest(x, blocks, count):
    """The largest |x| of each block of rows."""
    import torch

    rows = x.abs().flatten(1).amax(1)
    found = torch.zeros(count, dtype=rows.dtype, device=rows.device)
    return found.scatter_reduce_(0, blocks, rows, "amax")


def assert_agrees(batch, out, lse, **options):
    """FlashAttention's rule, for each 64 rows of a request: at most twice a plain run's error.

    And a quarter of what rounding the largest result costs, since a block may hold few weights.
    """
    want, want_lse = attended(batch, **options)
    plain, _ = attended(batch, plain=True, **options)
    first, end = batch.cu_seqlens_q[0], batch.cu_seqlens_q[-1]
    own = slice(first, end)
    blocks, count = blocks_of(batch)
    dtype = str(batch.q.dtype).removeprefix("torch.")

    def at(x):
        return largest(x[own], blocks[own], count)

    if end > first:
        error = at(out.double() - want)
        allowed = 2 * at(plain - want) + ROUNDING[dtype] / 4 * at(want) + 2.0**-20
        right = error <= allowed  # NaN is not
        by = error / allowed
        assert right.all(), (
            f"{int((~right).sum())} of {count - 1} blocks are off, "
            f"block {int(by.argmax())} by {float(by.max()):.3g} times what is allowed"
        )
        empty = (want_lse[own] == float("-inf")).all(1)
        assert not out[own][empty].any(), "a row that sees no key is exactly 0"
    assert_lse(lse, want_lse)
    assert not out[end:].any(), "rows behind the last request are 0"
    return out, lse


def assert_lse(lse, want):
    nothing = want == float("-inf")
    assert ((lse == float("-inf")) == nothing).all(), "-inf where nothing is seen, and there alone"
    off = (lse.double() - want).masked_fill(nothing, 0).abs()
    right = off <= _LSE + 1e-6 * want.masked_fill(nothing, 0).abs()
    assert right.all(), f"lse off by {float(off.max()):.3g}"


def assert_right(batch, **options):
    """The op agrees with float64; returns its results."""
    got = run(batch, **options)
    options.pop("out", None)
    return assert_agrees(batch, *got, **options)


def assert_same(one, other):
    """Two pairs of results, bit for bit."""
    import torch

    for x, y in zip(one, other, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        kind = {2: torch.int16, 4: torch.int32}[x.element_size()]
        different = x.contiguous().view(kind) != y.contiguous().view(kind)
        assert not different.any(), f"{int(different.sum())} of {different.numel()} differ"


def guarded(like, extra=3):
    """A buffer of 0x5a bytes, and a view of `like`'s shape within: rows around, a head beside."""
    import torch

    tokens, heads, dim = like.shape
    buffer = torch.empty((tokens + 2 * extra, heads + 1, dim), dtype=like.dtype, device=like.device)
    buffer.view(torch.uint8).fill_(0x5A)
    return buffer, buffer[extra:-extra, :heads]


def assert_untouched(buffer, view, extra=3):
    import torch

    left = buffer.clone().view(torch.int16)
    left[extra:-extra, : view.shape[1]] = 0x5A5A
    assert (left == 0x5A5A).all(), "something was written beside the output"


def with_(batch, **changes):
    return replace(batch, **changes)
