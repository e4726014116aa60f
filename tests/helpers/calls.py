# SPDX-License-Identifier: Apache-2.0
"""A legal call of every op, to be broken in one place, with all that it could write poisoned."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from fastkv import LayerCache, Rope, StaticScales, ops
from helpers.batches import floats, make_batch, poison, running_sum
from helpers.compare import assert_same_bits, bits

OPS = (
    "rope_write_kv",
    "gather_kv",
    "paged_attention",
    "masked_attention",
    "merge_states",
    "copy_pages",
)
WITH_CACHE = ("rope_write_kv", "gather_kv", "paged_attention", "copy_pages")
_POSITIONAL = {
    "rope_write_kv": ("qkv", "cache"),
    "gather_kv": ("cache",),
    "paged_attention": ("q", "cache"),
    "masked_attention": ("q", "k", "v"),
    "merge_states": ("out_a", "lse_a", "out_b", "lse_b"),
    "copy_pages": ("cache", "src", "dst"),
}
#: Tensors without which an op cannot run, whatever the format.
REQUIRED = {
    "rope_write_kv": ("qkv", "cu_seqlens_q", "cache_seqlens", "block_table"),
    "gather_kv": ("cache_seqlens", "block_table", "cu_seqlens_k", "out_k", "out_v"),
    "paged_attention": ("q", "cu_seqlens_q", "cache_seqlens", "block_table"),
    "masked_attention": ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"),
    "merge_states": ("out_a", "lse_a", "out_b", "lse_b"),
    "copy_pages": ("src", "dst"),
}


@dataclass
class Call:
    """Arguments of one op, by name."""

    op: str
    arguments: dict[str, Any]

    def __getitem__(self, name):
        """An argument; `cache.k` and `cache.static.k_zp` reach into the cache."""
        value = self.arguments[name.partition(".")[0]]
        for part in name.split(".")[1:]:
            value = getattr(value, part)
        return value

    def __setitem__(self, name, value):
        first, _, rest = name.partition(".")
        self.arguments[first] = _replaced(self.arguments.get(first), rest, value)

    def run(self):
        positional = _POSITIONAL[self.op]
        keywords = {n: a for n, a in self.arguments.items() if n not in positional}
        return getattr(ops, self.op)(*(self.arguments[n] for n in positional), **keywords)

    def arrays(self):
        """Every NumPy array of the call by name, those within its cache and rope included."""
        return dict(_arrays(self.arguments))

    def raises(self, exception):
        """Run, expect the exception and not a byte changed; returns the exception."""
        arrays = self.arrays()
        before = {name: bits(array) for name, array in arrays.items()}
        try:
            self.run()
        except exception as error:
            raised = error
        else:
            raise AssertionError(f"{self.op} raised nothing")
        for name, array in arrays.items():
            assert_same_bits(array, before[name])
        return raised


def _arrays(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            yield prefix + name, value
        elif isinstance(value, LayerCache | StaticScales | Rope):
            inside = {field.name: getattr(value, field.name) for field in fields(value)}
            yield from _arrays(inside, f"{prefix}{name}.")


def _replaced(owner, path, value):
    first, _, rest = path.partition(".")
    if not path:
        return value
    if not rest:
        return replace(owner, **{first: value})
    return replace(owner, **{first: _replaced(getattr(owner, first), rest, value)})


def legal_call(op, fmt="cache_int8", seed=0, **shape):
    """A call of an op that runs: two requests, one row of nobody, everything optional given."""
    rng = np.random.default_rng(seed)
    shape = {"cached": (20, 3), "new": (2, 4), "padding": 1} | shape
    batch = make_batch(rng, fmt, **shape)
    rows, heads = len(batch.qkv), batch.query_heads
    kv, dim = batch.cache.spec.num_kv_heads, batch.cache.spec.head_dim
    cu_seqlens_k = running_sum(batch.lengths)
    contiguous = {
        "cu_seqlens_k": cu_seqlens_k,
        "out_k": poison(rng, (cu_seqlens_k[-1], kv, dim), "float32"),
        "out_v": poison(rng, (cu_seqlens_k[-1], kv, dim), "float32"),
    }
    q = floats(rng, (rows, heads, dim))
    k, v = floats(rng, (2, cu_seqlens_k[-1], kv, dim))
    intervals = np.concatenate(
        [np.broadcast_to([0, n], (m, 2)) for n, m in zip(batch.lengths, batch.new, strict=True)]
        + [np.full((shape["padding"], 2), -9)]
    ).astype(np.int32)
    shared = {
        "sinks": floats(rng, heads),
        "mask_offsets": intervals,
        "out": poison(rng, q.shape, "float32"),
        "window": 9,
        "soft_cap": 5.0,
        "scale": 0.2,
        "return_lse": True,
    }
    arguments = {
        "rope_write_kv": {
            "qkv": batch.qkv,
            "cache": batch.cache,
            **batch.meta,
            "rope": batch.rope,
            "q_norm_weight": floats(rng, dim),
            "k_norm_weight": floats(rng, dim),
            **contiguous,
        },
        "gather_kv": {
            "cache": batch.cache,
            "cache_seqlens": batch.cache_seqlens,
            "block_table": batch.block_table,
            **contiguous,
        },
        "paged_attention": {"q": q, "cache": batch.cache, **batch.meta, **shared},
        "masked_attention": {
            "q": q,
            "k": k,
            "v": v,
            "cu_seqlens_q": batch.cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            **shared,
        },
        "merge_states": {
            "out_a": q,
            "lse_a": floats(rng, (rows, heads)),
            "out_b": floats(rng, q.shape),
            "lse_b": floats(rng, (rows, heads)),
        },
        "copy_pages": {
            "cache": batch.cache,
            "src": np.array([0, 1, -1], np.int32),
            "dst": np.array([2, 3, 4], np.int32),
        },
    }
    return Call(op, arguments[op])
