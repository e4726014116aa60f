# SPDX-License-Identifier: Apache-2.0
"""Batches for context parallelism, and what a rank's part of the cache looks like."""

from dataclasses import replace

import numpy as np

from fastkv import arrays, ops
from helpers import oracle
from helpers.batches import FORMATS, make_batch, poison, tensors_of

P = 16
# Nothing cached; ends exactly at a page, at a turn of 2 and of 4 ranks; one page; no rows at all.
DECODE = {"cached": (0, 15, 31, 63, 64, 5, 127), "new": (1, 1, 1, 1, 1, 0, 1)}
DRAFTS = {"cached": (0, 14, 61, 30, 9), "new": (4, 4, 5, 0, 3)}
SINKS = np.array([0.5, -1.0, 2.0, 0.0, 3.0, -np.inf], np.float32)

CASES = {f"decode {fmt}": {"fmt": fmt, **DECODE} for fmt in FORMATS}
CASES |= {f"drafts {fmt}": {"fmt": fmt, **DRAFTS} for fmt in FORMATS}
CASES |= {
    "sinks and cap": {"fmt": "cache_int8", **DRAFTS, "sinks": SINKS, "soft_cap": 1.5, "scale": 0.3},
    "window": {"fmt": "none", **DRAFTS, "window": 20},
    "window of one page": {"fmt": "none", **DECODE, "window": P},
    "intervals": {"fmt": "cache_fp8", **DRAFTS, "mask": True, "window": 40},
    "not causal": {"fmt": "none", **DRAFTS, "causal": False},
    "prefill": {"fmt": "block_wise_fp8", "cached": (0, 37), "new": (90, 41)},
    "bfloat16": {"fmt": "none", "dtype": "bfloat16", "qkv_dtype": "bfloat16", **DRAFTS},
    "padding": {"fmt": "none", **DECODE, "padding": 3, "sinks": SINKS},
    "pages of one token": {"fmt": "none", "cached": (0, 3, 4, 9), "new": (1, 1, 2, 3), "page": 1},
    "page that is missing": {"fmt": "none", **DRAFTS, "missing": (2, 1)},
    "one column": {"fmt": "none", "cached": (3,), "new": (2,), "narrow": True, "sinks": SINKS},
    "no request": {"fmt": "none", "cached": (), "new": (), "padding": 2},
    "no row": {"fmt": "none", "cached": (20,), "new": (0,)},
}
_OPTIONS = ("sinks", "soft_cap", "scale", "window", "causal")


def make(name):
    """A case's batch, its cached tokens stored, and the options of its attention."""
    case = dict(CASES[name])
    options = {key: case.pop(key) for key in _OPTIONS if key in case}
    masked, missing, narrow = (case.pop(key, None) for key in ("mask", "missing", "narrow"))
    case["page_size"] = case.pop("page", P)
    rng = np.random.default_rng(len(name))
    batch = make_batch(rng, case.pop("fmt"), **case).fill(rng, "cached")
    if missing:
        batch.block_table[missing] = -1
    if narrow:
        batch = batch.with_(block_table=batch.block_table[:, :1].copy())
    if masked:
        options["mask_offsets"] = _intervals(rng, batch)
    return batch, options


def _intervals(rng, batch):
    found = np.zeros((len(batch.qkv), 2), np.int32)
    for b, length in enumerate(batch.lengths):
        for row in range(len(batch.qkv))[batch.rows(b)]:
            found[row] = np.sort(rng.integers(0, length + 1, 2))
    return found


def pool(batch, rank, size):
    """The cache with every page that is not the rank's poisoned."""
    own = batch.block_table[:, rank::size]
    foreign = np.setdiff1d(np.arange(len(batch.cache.k)), own)
    copies = {}
    for name, tensor in tensors_of(batch.cache).items():
        copies[name] = tensor.copy()
        shape = (len(foreign), *tensor.shape[1:])
        copies[name][foreign] = poison(np.random.default_rng(rank), shape, tensor.dtype.name)
    return replace(batch.cache, **copies), foreign


def one_rank(batch, options):
    """Out and LSE of one rank over all of the cache; the new tokens are written."""
    q = ops.rope_write_kv(batch.qkv, batch.cache, **batch.meta, rope=batch.rope)
    return q, *ops.paged_attention(q, batch.cache, **batch.meta, **options, return_lse=True)


def exact(batch, q, options):
    """The same in float64, over what the cache holds."""
    given = dict(options)
    mask, causal = given.pop("mask_offsets", None), given.pop("causal", True)
    window, scale = given.pop("window", None), given.pop("scale", q.shape[2] ** -0.5)
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for b, length in enumerate(batch.lengths):
        rows = batch.rows(b)
        if batch.new[b] == 0:
            continue
        k, v = batch.held("k", b), batch.held("v", b)
        intervals = None if mask is None else mask[rows]
        seen = oracle.visible_mask(batch.new[b], length, causal, window, intervals)
        pages = batch.block_table[b, np.arange(length) // batch.cache.spec.page_size]
        out[rows], lse[rows] = oracle.attention(q[rows], k, v, seen & (pages >= 0), scale, **given)
    return out, lse


def to(library, value):
    """A tensor of a library, or what is no tensor as it is."""
    return arrays.convert(value, library) if isinstance(value, np.ndarray) else value


def layer_to(library, cache):
    """A copy of a layer's cache in a library."""
    moved = {name: to(library, tensor) for name, tensor in tensors_of(cache).items()}
    return replace(cache, **moved, static=cache.static and cache.static.to(library))


def run(context, name, library):
    """One rank's result of a case: out, lse, and whether other ranks' pages were left alone."""
    batch, options = make(name)
    rank, size = context.group.rank, context.group.size
    own, foreign = pool(batch, rank, size)
    before = {key: tensor[foreign].tobytes() for key, tensor in tensors_of(own).items()}
    cache = layer_to(library, own)
    options = {key: to(library, value) for key, value in options.items()}
    meta = {key: to(library, value) for key, value in batch.meta.items()}
    step = context.step(**meta, mask_offsets=options.pop("mask_offsets", None))
    rope = replace(batch.rope, cos=to(library, batch.rope.cos), sin=to(library, batch.rope.sin))
    q = step.rope_write_kv(to(library, batch.qkv), cache, rope=rope)
    out, lse = step.paged_attention(q, cache, **options, return_lse=True)
    after = {key: arrays.to_host(getattr(cache, key))[foreign].tobytes() for key in before}
    return arrays.to_host(out).copy(), arrays.to_host(lse).copy(), before == after
