# SPDX-License-Identifier: Apache-2.0
"""Cases of `paged_attention` on a GPU, and runs of it against float64 and against itself.

A specialization takes seconds to compile, so the cases share a few: `CASES` lists them, with the
query rows a request that choose the kernel's columns.
"""

import numpy as np

from fastkv import ops
from helpers.attend import attended, filled
from helpers.batches import case_id, floats, running_sum
from helpers.compare import assert_attends, assert_same_bits
from helpers.gpu import fetch, put

_NAMES = ("fmt", "granularity", "head_dim", "dtype", "page_size", "kv_heads", "group")
DECODE = {"cached": (37, 0, 130, 1, 700), "new": (1, 1, 1, 0, 1)}
DRAFT = {"cached": (60, 5, 0, 16, 333), "new": (4, 8, 9, 0, 17)}
SHORT = {"cached": (60, 5, 0, 16), "new": (4, 4, 4, 4)}
PREFILL = {"cached": (0, 200, 64, 3), "new": (130, 0, 33, 17)}
MIXED = {"cached": (90, 0, 31, 200, 7), "new": (1, 130, 0, 4, 1)}
# Format, static granularity, head dim, dtype of q (of a `none` cache too), page size, KV heads, G,
# requests: 14 specializations, since rows of one request (T / B * G) give 8, 16 or 32 a block.
CASES = [
    ("none", None, 128, "bfloat16", 16, 2, 4, DECODE),  # 8
    ("none", None, 128, "bfloat16", 64, 2, 8, DRAFT),  # 32
    ("none", None, 128, "bfloat16", 32, 3, 4, MIXED),
    ("none", None, 64, "float16", 128, 2, 7, DECODE),  # 8
    ("none", None, 64, "float16", 32, 3, 1, PREFILL),  # 32
    ("cache_int8", "head", 128, "bfloat16", 128, 2, 16, DECODE),  # 16
    ("cache_int8", "channel", 96, "float16", 16, 2, 4, DRAFT),  # 32
    ("cache_int8", "flat", 96, "float16", 64, 1, 7, PREFILL),
    ("cache_fp8", "head", 256, "bfloat16", 32, 2, 8, DECODE),  # 8
    ("cache_fp8", "head", 256, "bfloat16", 64, 1, 4, SHORT),  # 16
    ("cache_fp8", "head", 256, "bfloat16", 16, 1, 7, MIXED),
    ("cache_int4_zp", "channel", 128, "bfloat16", 16, 2, 4, DECODE),  # 8
    ("cache_int4_zp", "flat", 128, "bfloat16", 64, 2, 4, MIXED),  # 32
    ("cache_int4_zp", "channel", 64, "float32", 128, 2, 4, SHORT),  # 16
    ("block_wise_fp8", None, 128, "bfloat16", 128, 3, 4, DECODE),  # 8
    ("block_wise_fp8", None, 128, "bfloat16", 16, 2, 4, MIXED),  # 32
    ("block_wise_fp8", None, 128, "bfloat16", 32, 1, 16, DRAFT),
    ("cache_int8", "flat", 96, "float32", 32, 2, 1, PREFILL),  # 32
]
NONE, INT8, FP8, INT4, BLOCK_WISE = CASES[1], CASES[5], CASES[10], CASES[12], CASES[15]
EACH = (NONE, CASES[6], FP8, INT4, BLOCK_WISE)
OPTIONS = {
    "not_causal": {"causal": False},
    "window": {"window": 29},
    "window_of_one": {"window": 1},
    "soft_cap": {"soft_cap": 0.7},
    "sinks": {"sinks": True},
    "intervals": {"mask_offsets": True},
    "scale": {"scale": 0.3},
    "not_causal_window": {"causal": False, "window": 40},
    "capped_sinks_intervals": {"soft_cap": 0.7, "sinks": True, "mask_offsets": True},
    "all": {"window": 50, "soft_cap": 2.0, "sinks": True, "mask_offsets": True, "scale": 0.2},
}


def case_name(case):
    return case_id(dict(enumerate(case[:-1])))


def batch_of(case, seed=11, dtype=None, **changes):
    """The case's batch and q; `changes` are arguments of `make_batch`."""
    named = dict(zip(_NAMES, case, strict=False)) | case[-1] | changes
    if named["fmt"] != "none":
        named["dtype"] = "bfloat16"
    batch = filled(seed, named.pop("fmt"), named.pop("granularity"), **named)
    spec = batch.cache.spec
    rng = np.random.default_rng(seed + 1)
    shape = (len(batch.qkv), batch.query_heads, spec.head_dim)
    return batch, floats(rng, shape, dtype or case[3])


def options_of(batch, asked, seed=5):
    """Options with sinks and intervals made for the batch; a fifth of the rows sees nothing."""
    rng = np.random.default_rng(seed)
    made = dict(asked)
    if asked.get("sinks") is True:
        made["sinks"] = floats(rng, batch.query_heads, scale=2.0)
    if asked.get("mask_offsets") is True:
        offsets = np.full((len(batch.qkv), 2), (9, 2), np.int32)
        for b, length in enumerate(batch.lengths):
            ends = np.sort(rng.integers(0, length + 1, (batch.new[b], 2)), axis=1)
            ends[rng.random(len(ends)) < 0.2] = length
            offsets[batch.rows(b)] = ends
        made["mask_offsets"] = offsets
    return made


def run(batch, q, library="torch", cache=None, **options):
    """Out and LSE of the op on a GPU, as NumPy arrays."""
    cache = put(batch.cache, library) if cache is None else cache
    options = put(options, library)
    out, lse = ops.paged_attention(
        put(q, library), cache, **put(batch.meta, library), return_lse=True, **options
    )
    assert options.get("out") is None or out is options["out"]
    return fetch(out).view(q.dtype), fetch(lse)


def assert_right(batch, q, library="torch", cache=None, rows=None, **options):
    """The op agrees with float64; returns its results."""
    got = run(batch, q, library, cache, **options)
    options.pop("out", None)
    assert_attends(*got, attended(batch, q, rows, **options))
    return got


def alone(batch, q, order, **options):
    """The batch of some of its requests, with their q and options."""
    rows = np.concatenate([np.arange(len(q))[batch.rows(b)] for b in order])
    new = tuple(batch.new[b] for b in order)
    part = batch.with_(
        cached=tuple(batch.cached[b] for b in order),
        new=new,
        cu_seqlens_q=running_sum(new),
        cache_seqlens=batch.cache_seqlens[order],
        block_table=batch.block_table[order],
        qkv=batch.qkv[rows],
    )
    if options.get("mask_offsets") is not None:
        options["mask_offsets"] = options["mask_offsets"][rows]
    return part, q[rows], options, rows


def assert_alike(whole, part, rows):
    """Rows of two results, bit for bit."""
    for one, other in zip(whole, part, strict=True):
        assert_same_bits(one[rows], other)
