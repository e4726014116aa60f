# SPDX-License-Identifier: Apache-2.0
"""Attention over contiguous K and V in float64, and beside it a plain run in low precision.

PyTorch's, on whatever device the tensors are: thousands of rows take milliseconds on a GPU. Written
from the op's contract; it shares nothing with fastkv.
"""

_CHUNK = 256  # query rows at once


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
    lse = torch.full(batch.q.shape[:2], -torch.inf, dtype=torch.float64, device=batch.q.device)
    for rows, keys in batch.requests():
        n, length = rows.stop - rows.start, keys.stop - keys.start
        for first in range(0, n, _CHUNK):
            own = torch.arange(first, min(first + _CHUNK, n), device=batch.q.device)
            at = rows.start + own
            offsets = None if mask_offsets is None else mask_offsets[at]
            bounds = visible(own, length, n, causal=causal, window=window, mask_offsets=offsets)
            x = (batch.q[at], batch.k[keys], batch.v[keys])
            out[at], lse[at] = attend(*x, *bounds, **shape)
    return out, lse
