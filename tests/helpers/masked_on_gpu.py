# SPDX-License-Identifier: Apache-2.0
"""Batches of `masked_attention` on a GPU, and attention over them in float64 beside a plain run.

Everything is PyTorch's, float64 as well: requests of thousands of rows take milliseconds there.
The oracle is written from the op's contract and shares nothing with fastkv.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from fastkv import ops
from helpers.compare import ROUNDING

DEVICE = "cuda:0"
_CHUNK = 256  # query rows that the oracle attends to at once
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


# --- float64 ----------------------------------------------------------------------------------


def visible(rows, length, n, *, causal, window, mask_offsets):
    """First key and end of what each of the request's rows sees, `[n]` each.

    Args:
        rows: indices of the rows within the request, a tensor.
        length: its keys.
        n: all of its rows.
        causal: as the op.
        window: as the op.
        mask_offsets: of these rows.
    """
    import torch

    position = length - n + rows
    low = torch.zeros_like(position)
    high = position + 1 if causal else torch.full_like(position, length)
    if window is not None:
        low = torch.maximum(low, position - window + 1)
    if mask_offsets is not None:
        low = torch.maximum(low, mask_offsets[:, 0].long())
        high = torch.minimum(high, mask_offsets[:, 1].long())
    return low, high


def attend(q, k, v, low, high, *, scale, soft_cap, sinks, dtype):
    """Attention of rows over one request's keys: out in float64 and LSE.

    Args:
        q: `[n, Hq, D]`.
        k: `[L, Hkv, D]`.
        v: `[L, Hkv, D]`.
        low: first key that each row sees.
        high: end of what it sees.
        scale: as the op.
        soft_cap: as the op.
        sinks: as the op.
        dtype: None: everything in float64. Else the plain run: products and softmax in float32,
            weights and result rounded to it.
    """
    import torch

    kind = torch.float64 if dtype is None else torch.float32
    n, heads, dim = q.shape
    length, kv_heads, _ = k.shape
    if not length:
        lse = torch.full((n, heads), -torch.inf, dtype=torch.float64, device=q.device)
        return torch.zeros_like(q, dtype=torch.float64), lse
    q, k, v = q.to(kind).view(n, kv_heads, -1, dim), k.to(kind), v.to(kind)
    score = torch.einsum("nhgd,lhd->hgnl", q, k) * scale
    if soft_cap is not None:
        score = soft_cap * torch.tanh(score / soft_cap)
    at = torch.arange(length, device=q.device)
    seen = (at >= low[:, None]) & (at < high[:, None])
    score = score.masked_fill(~seen, -torch.inf)
    top = score.amax(-1).clamp_min(-1e30)
    weight = torch.exp(score - top[..., None])
    total = weight.sum(-1)
    lse = (top + torch.log(total)).permute(2, 0, 1).reshape(n, heads)
    if sinks is not None:
        total = total + torch.exp(sinks.to(kind).view(kv_heads, -1, 1) - top)
    weight = weight / torch.where(total == 0, 1, total)[..., None]
    if dtype is not None:
        weight = weight.to(dtype).to(kind)
    out = torch.einsum("hgnl,lhd->nhgd", weight, v).reshape(n, heads, dim)
    return (out if dtype is None else out.to(dtype)).double(), lse.double()


def attended(batch, *, plain=False, causal=True, window=None, mask_offsets=None, **options):
    """Out and LSE of a batch in float64, or of a plain run in its dtype.

    Rows of nobody are 0, their LSE -inf.
    """
    import torch

    dim = batch.q.shape[2]
    shape = {"scale": dim**-0.5, "soft_cap": None, "sinks": None} | options
    shape["dtype"] = batch.q.dtype if plain else None
    out = torch.zeros_like(batch.q, dtype=torch.float64)
    lse = torch.full(batch.q.shape[:2], -torch.inf, dtype=torch.float64, device=DEVICE)
    for rows, keys in batch.requests():
        n, length = rows.stop - rows.start, keys.stop - keys.start
        for first in range(0, n, _CHUNK):
            own = torch.arange(first, min(first + _CHUNK, n), device=DEVICE)
            at = rows.start + own
            offsets = None if mask_offsets is None else mask_offsets[at]
            bounds = visible(own, length, n, causal=causal, window=window, mask_offsets=offsets)
            x = (batch.q[at], batch.k[keys], batch.v[keys])
            out[at], lse[at] = attend(*x, *bounds, **shape)
    return out, lse


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


def with_(batch, **changes):
    return replace(batch, **changes)
