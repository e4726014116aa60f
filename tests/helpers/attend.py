# SPDX-License-Identifier: Apache-2.0
"""Long batches filled at once, and attention over them in float64 with the sizes of its sums."""

import numpy as np

from helpers import oracle
from helpers.batches import make_batch
from helpers.compare import ROUNDING, Attended, query_rounding
from helpers.oracle import values_of


def filled(seed, fmt, granularity=None, **named):
    """A batch whose requests hold random tokens, and NaN, or bytes that are NaN, all else."""
    rng = np.random.default_rng(seed)
    batch = make_batch(rng, fmt, granularity, **named)
    if fmt.endswith("fp8"):
        for side in (batch.cache.k, batch.cache.v):
            side.view(np.uint8)[...] = 0x7F  # NaN
    for b, length in enumerate(batch.lengths):
        shape = (2, length, batch.cache.spec.num_kv_heads, batch.cache.spec.head_dim)
        k, v = rng.standard_normal(shape, np.float32)
        store(batch, b, "k", k)
        store(batch, b, "v", 0.7 * v + np.float32(0.3))
    return batch


def places(batch, b):
    """Pages and slots of a request's tokens."""
    pages, slots = np.divmod(np.arange(batch.lengths[b]), batch.cache.spec.page_size)
    return batch.block_table[b, pages], slots


def store(batch, b, side, x):
    """Put a request's tokens `[L, Hkv, D]` into the cache, through the oracle."""
    spec, static = batch.cache.spec, batch.cache.static
    stored, scale = oracle.quantize(
        batch.format,
        x,
        quant=None if static is None else getattr(static, f"{side}_quant"),
        zp=None if static is None else getattr(static, f"{side}_zp"),
        dtype=spec.dtype,
        scale_dtype=spec.scale_dtype,
    )
    pages, slots = places(batch, b)
    for name, bits in ((side, stored), (f"{side}_scale", scale)):
        if bits is not None:
            data = getattr(batch.cache, name)
            data.view(f"u{data.dtype.itemsize}")[pages, :, slots] = bits


def held(batch, b, side):
    """Float64 `[L, Hkv, D]` of a request; whatever lies there for page -1."""
    spec, static = batch.cache.spec, batch.cache.static
    pages, slots = places(batch, b)
    scale = getattr(batch.cache, f"{side}_scale")
    return oracle.dequantize(
        batch.format,
        np.ascontiguousarray(getattr(batch.cache, side)[pages, :, slots]),
        dequant=None if static is None else getattr(static, f"{side}_dequant"),
        zp=None if static is None else getattr(static, f"{side}_zp"),
        scale=None if scale is None else np.ascontiguousarray(scale[pages, :, slots]),
        dtype=spec.dtype,
        scale_dtype=spec.scale_dtype,
    )


def attended(batch, q, rows=None, **options):
    """What `paged_attention` should give, for all of the batch's rows or some: `Attended`.

    Args:
        batch: the batch.
        q: `[T, Hq, D]`.
        rows: indices of rows; None: those of all requests.
        options: of the op.
    """
    found = [_of_request(batch, b, q, rows, **options) for b in range(len(batch.new))]
    every = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    spec, static = batch.cache.spec, batch.cache.static
    product = spec.dtype if batch.format == "none" else "float16"
    channels = static is not None and np.size(static.k_dequant) > spec.num_kv_heads
    return Attended(
        *every,
        weight=ROUNDING[product],
        query=query_rounding(q.dtype.name, product, channels),
        cap=options.get("soft_cap") or 0.0,
    )


def _of_request(
    batch,
    b,
    q,
    rows,
    *,
    causal=True,
    window=None,
    mask_offsets=None,
    scale=None,
    soft_cap=None,
    sinks=None,
):
    own = np.arange(len(q))[batch.rows(b)]
    chosen = np.arange(len(own)) if rows is None else np.flatnonzero(np.isin(own, rows))
    k, v = held(batch, b, "k"), held(batch, b, "v")
    scale = batch.cache.spec.head_dim**-0.5 if scale is None else scale
    mask = np.zeros((len(own), len(k)), bool)
    for j in chosen:
        mask[j] = _visible(len(k) - len(own) + j, len(k), causal, window)
        if mask_offsets is not None:
            start, end = mask_offsets[own[j]]
            mask[j] &= (np.arange(len(k)) >= start) & (np.arange(len(k)) < end)
    pages, _ = places(batch, b)
    mask = mask[chosen] & (pages >= 0)
    x = values_of(q)[own[chosen]]
    out, lse = oracle.attention(x, k, v, mask, scale, soft_cap, sinks)
    finite = np.nan_to_num(np.abs(v), posinf=0.0)
    clean = np.nan_to_num(k, posinf=0.0, neginf=0.0)
    value, _ = oracle.attention(x, clean, finite, mask, scale, soft_cap, sinks)
    score, beside_score, beside_value = _sizes(batch, x, clean, mask, abs(scale))
    return own[chosen], out, lse, score, value, beside_score, beside_value, mask.sum(axis=1)


def _visible(position, length, causal, window):
    keys = np.arange(length)
    low = -1 if window is None else position - window
    return (keys > low) & (keys <= (position if causal else length))


def _sizes(batch, q, k, mask, scale):
    """Of each row and head, as `Attended` has them: score, beside_score, beside_value."""
    group, dim = q.shape[1] // k.shape[1], q.shape[2]
    score = np.zeros(q.shape[:2])
    for h in range(q.shape[1]):
        sums = np.abs(q[:, h]) @ np.abs(k[:, h // group]).T * mask
        score[:, h] = scale * sums.max(axis=1, initial=0)
    codes = {"k": np.zeros((k.shape[1], dim)), "v": np.zeros((k.shape[1], dim))}
    if batch.format == "cache_int4_zp":  # |code - 0| and |zp| are at most 8
        for side in "kv":
            dequant = values_of(getattr(batch.cache.static, f"{side}_dequant"))
            codes[side] = 16 * dequant.reshape(codes[side].shape)
    per_head = {side: np.repeat(x, group, axis=0) for side, x in codes.items()}
    beside = scale * (np.abs(q) * per_head["k"]).sum(axis=2)
    return score, beside, np.broadcast_to(per_head["v"], q.shape)
