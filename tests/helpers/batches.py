# SPDX-License-Identifier: Apache-2.0
"""Random batches over poisoned caches: shuffled pages, real scales, K unlike V."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastkv import CacheSpec, LayerCache, QuantType, Rope, StaticScales
from fastkv.arrays import numpy_dtype
from helpers import oracle
from helpers.compare import bits

FORMATS = tuple(quant.value for quant in QuantType)
#: Formats by the shape of their static multipliers.
VARIANTS = (
    ("none", None),
    ("cache_int8", "head"),
    ("cache_int8", "channel"),
    ("cache_int8", "flat"),
    ("cache_fp8", "head"),
    ("cache_int4_zp", "channel"),
    ("cache_int4_zp", "flat"),
    ("block_wise_fp8", None),
)
LARGEST_CODE = {"cache_int8": 127, "cache_fp8": 448, "cache_int4_zp": 7.5}
GRANULARITY = {"cache_int8": "head", "cache_fp8": "head", "cache_int4_zp": "channel"}


def floats(rng, shape, dtype="float32", scale=1.0):
    """Normal values in a dtype."""
    return (scale * rng.standard_normal(shape)).astype(numpy_dtype(dtype))


def poison(rng, shape, dtype):
    """Memory that shows when it is read: NaN, or any byte at all where bytes are codes."""
    dtype = numpy_dtype(dtype)
    if dtype.itemsize == 1:
        return rng.integers(0, 256, shape, np.uint8).view(dtype)
    return np.full(shape, np.nan, dtype)


def static_scales(rng, fmt, heads, dim, granularity=None, dtype="float32", largest_zp=8.0):
    """Multipliers that use most of a format's codes for normal values; None if it takes none.

    No two are alike, none is 1, and dequant is only near the inverse of quant: whoever takes one
    for the other, or K's for V's, gets other numbers.
    """
    if fmt not in LARGEST_CODE:
        return None
    shapes = {"head": (heads,), "channel": (heads, dim), "flat": (heads * dim,)}
    shape = shapes[granularity or GRANULARITY[fmt]]
    fields = {}
    for side, amax in (("k", 3.5), ("v", 2.5)):
        quant = LARGEST_CODE[fmt] / (amax * rng.uniform(0.8, 1.2, shape))
        fields[f"{side}_quant"] = quant
        fields[f"{side}_dequant"] = rng.uniform(0.99, 1.01, shape) / quant
        if fmt == "cache_int4_zp":
            fields[f"{side}_zp"] = rng.uniform(-largest_zp, largest_zp, shape)
    return StaticScales(**{name: a.astype(numpy_dtype(dtype)) for name, a in fields.items()})


def layer_cache(rng, spec, num_pages, static=None, layer_id=0):
    """One layer's poisoned cache."""
    tensors = {
        t.name: poison(rng, t.shape, t.dtype) for t in spec.layer_tensors(layer_id, num_pages)
    }
    return LayerCache(spec, layer_id, **tensors, static=static)


def tensors_of(cache):
    """The cache's own tensors by name, absent ones left out."""
    every = {name: getattr(cache, name) for name in ("k", "v", "k_scale", "v_scale")}
    return {name: tensor for name, tensor in every.items() if tensor is not None}


def clone(cache):
    """The cache with copies of its own tensors, in C order."""
    return replace(cache, **{name: np.array(t, order="C") for name, t in tensors_of(cache).items()})


def snapshot(cache):
    """Copies of the cache's bits by name."""
    return {name: bits(tensor) for name, tensor in tensors_of(cache).items()}


def put_token(cache, page, slot, k, v):
    """Store one token's `[Hkv, D]`, quantized by the oracle."""
    spec, static = cache.spec, cache.static
    for side, x in (("k", k), ("v", v)):
        stored, scale = oracle.quantize(
            cache.quant.name.value,
            x[None],
            quant=None if static is None else getattr(static, f"{side}_quant"),
            zp=None if static is None else getattr(static, f"{side}_zp"),
            dtype=spec.dtype,
            scale_dtype=spec.scale_dtype,
        )
        data = getattr(cache, side)
        data.view(f"u{data.dtype.itemsize}")[page, :, slot] = stored[0]
        if scale is not None:
            scales = getattr(cache, f"{side}_scale")
            scales.view(f"u{scales.dtype.itemsize}")[page, :, slot] = scale[0]


def running_sum(counts, start=0):
    """The int32 cu_seqlens of counts."""
    return (start + np.concatenate([[0], np.cumsum(counts)])).astype(np.int32)


def shuffled_pages(rng, lengths, page_size, spare_pages=3, spare_columns=2):
    """A block table `[B, M]` with no page twice and -1 behind each request; and N."""
    needed = [-(-length // page_size) for length in lengths]
    columns = max([0, *needed]) + spare_columns
    num_pages = sum(needed) + spare_pages
    ids = rng.permutation(num_pages)
    table = np.full((len(lengths), columns), -1, np.int32)
    at = 0
    for b, count in enumerate(needed):
        table[b, :count] = ids[at : at + count]
        at += count
    return table, num_pages


def covering_cases():
    """Arguments of `make_batch` that pair every variant with every page size and head dim.

    Together they take each G and each dtype in turn; 40 in all.
    """
    cases = []
    for i in range(40):
        turn, (fmt, granularity) = i // 8, VARIANTS[i % 8]
        cases.append(
            {
                "fmt": fmt,
                "granularity": granularity,
                "head_dim": (64, 96, 128, 256)[(i + turn) % 4],
                "page_size": (1, 16, 32, 64, 128)[i % 5],
                "group": (1, 2, 3, 4, 8, 16)[(i + turn) % 6],
                "kv_heads": 1 + (i + turn) % 3,
                "dtype": ("bfloat16", "float16", "float32")[turn % 3],
                "scale_dtype": ("float32", "bfloat16", "float16")[turn % 3],
                "static_dtype": ("float32", "bfloat16", "float32", "float16", "float32")[turn],
                "qkv_dtype": ("float32", "bfloat16", "float16")[(i + turn) % 3],
            }
        )
    return cases


def case_id(case):
    """A readable pytest id of such arguments."""
    return "-".join(str(value) for value in case.values() if value is not None)


@dataclass(frozen=True)
class Batch:
    """A batch: its metadata, a poisoned cache with room for it, and its tokens."""

    cache: LayerCache
    cached: tuple[int, ...]
    new: tuple[int, ...]
    cu_seqlens_q: Any
    cache_seqlens: Any
    block_table: Any
    query_heads: int
    qkv: Any
    rope: Rope

    @property
    def meta(self):
        """The arguments that every paged op takes."""
        names = ("cu_seqlens_q", "cache_seqlens", "block_table")
        return {name: getattr(self, name) for name in names}

    @property
    def lengths(self):
        return tuple(c + n for c, n in zip(self.cached, self.new, strict=True))

    @property
    def format(self):
        return self.cache.quant.name.value

    def rows(self, b):
        return slice(int(self.cu_seqlens_q[b]), int(self.cu_seqlens_q[b + 1]))

    def heads(self, dtype=np.float64):
        """Q, K and V heads of qkv."""
        spec = self.cache.spec
        kv = spec.num_kv_heads
        shape = (len(self.qkv), self.query_heads + 2 * kv, spec.head_dim)
        x = oracle.values_of(self.qkv).reshape(shape).astype(dtype)
        return x[:, : self.query_heads], x[:, -2 * kv : -kv], x[:, -kv:]

    def owned(self, which="new"):
        """Page and slot of the tokens: `new`, `cached` or `all`; dropped ones left out."""
        for b, (cached, length) in enumerate(zip(self.cached, self.lengths, strict=True)):
            start, stop = {"new": (cached, length), "cached": (0, cached), "all": (0, length)}[
                which
            ]
            for i in range(start, stop):
                page, slot = divmod(i, self.cache.spec.page_size)
                if self.block_table[b, page] >= 0:
                    yield b, i, int(self.block_table[b, page]), slot

    def owned_slots(self, which):
        """The `(page, slot)` pairs of `owned`."""
        return [(page, slot) for _, _, page, slot in self.owned(which)]

    def fill(self, rng, which="all"):
        """Put random tokens into the cache, through the oracle; returns self."""
        spec = self.cache.spec
        for _, _, page, slot in self.owned(which):
            k, v = rng.standard_normal((2, spec.num_kv_heads, spec.head_dim)).astype(np.float32)
            put_token(self.cache, page, slot, k, 0.7 * v + np.float32(0.3))
        return self

    def held(self, side, b):
        """Float64 `[L, Hkv, D]` that the cache holds of a request."""
        return oracle.read_cache(self.cache, side, self.block_table[b], self.lengths[b])

    def with_(self, **changes):
        return replace(self, **changes)


def make_batch(
    rng,
    fmt="none",
    granularity=None,
    *,
    cached=(5, 0, 37),
    new=(1, 4, 9),
    kv_heads=2,
    group=3,
    head_dim=64,
    page_size=16,
    dtype="float32",
    qkv_dtype="float32",
    scale_dtype="float32",
    static_dtype="float32",
    largest_zp=8.0,
    padding=0,
    first_row=0,
    rotary_dim=None,
    interleaved=False,
):
    """A random batch of requests with `cached[b]` cached and `new[b]` new tokens.

    Args:
        rng: seeds everything.
        fmt: the format.
        granularity: `head`, `channel` or `flat` for static multipliers; None: the usual one.
        cached: cached tokens of each request.
        new: new tokens of each request.
        kv_heads: Hkv.
        group: G.
        head_dim: D.
        page_size: P.
        dtype: of a `none` cache.
        qkv_dtype: of qkv.
        scale_dtype: of paged scales.
        static_dtype: of static multipliers.
        largest_zp: bound of |zero points|.
        padding: rows behind the batch's.
        first_row: rows before the batch's.
        rotary_dim: of the rope, D if None.
        interleaved: of the rope.
    """
    spec = CacheSpec(1, kv_heads, head_dim, page_size, fmt, dtype, scale_dtype)
    lengths = [c + n for c, n in zip(cached, new, strict=True)]
    table, num_pages = shuffled_pages(rng, lengths, page_size)
    static = static_scales(rng, fmt, kv_heads, head_dim, granularity, static_dtype, largest_zp)
    cu = running_sum(new, first_row)
    width = (kv_heads * group + 2 * kv_heads) * head_dim
    rope = Rope.from_theta(
        10000.0, rotary_dim or head_dim, max([1, *lengths]), interleaved=interleaved
    )
    return Batch(
        cache=layer_cache(rng, spec, num_pages, static),
        cached=tuple(cached),
        new=tuple(new),
        cu_seqlens_q=cu,
        cache_seqlens=np.array(cached, np.int32),
        block_table=table,
        query_heads=kv_heads * group,
        qkv=floats(rng, (int(cu[-1]) + padding, width), qkv_dtype),
        rope=rope,
    )
