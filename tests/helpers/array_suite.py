# SPDX-License-Identifier: Apache-2.0
"""The tests that every array library passes: zero-copy both ways, and ops on its tensors.

A test module subclasses `ArraySuite` with a `Tensors`, which speaks to its library without fastkv.
"""

import gc
from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from fastkv import BatchMeta, CacheSpec, StaticScales, arrays, ops
from fastkv.backends import get_backend
from fastkv.dtypes import ITEMSIZE
from fastkv.errors import PlacementError, UnknownNameError
from fastkv.scales import FIELDS, load_scales, save_scales
from helpers.batches import VARIANTS, make_batch, running_sum, static_scales
from helpers.compare import assert_same_bits

#: What the ops take, and what a checkpoint may hold besides.
DTYPES = tuple(ITEMSIZE)
MORE_DTYPES = ("float64", "int64", "bool")
# Slices of a [5, 6, 4] tensor, by way of the library's own indexing.
SLICES = {
    "rows": (slice(1, 4),),
    "inner": (slice(None), slice(1, 3)),
    "steps": (slice(None, None, 2), slice(1, None, 3), slice(1, 4, 2)),
    "picked": (2,),
    "one": (slice(3, 4), slice(None), slice(2, 3)),
}


class Tensors(ABC):
    """A library's own ways, without fastkv."""

    name: str

    @abstractmethod
    def make(self, host):
        """A tensor of its own memory with the dtype and bits of a NumPy array."""

    @abstractmethod
    def address(self, tensor):
        """Where its first element lies."""

    @abstractmethod
    def bits(self, tensor):
        """A NumPy array of its bits, as the library reads them."""

    @abstractmethod
    def has_dtype(self, tensor, name):
        """Whether the library calls its dtype so."""

    @abstractmethod
    def strides(self, tensor):
        """In elements."""

    @abstractmethod
    def overwrite(self, tensor, bits):
        """Write bits into the tensor's memory, by the library's own means."""

    def transpose(self, tensor):
        return tensor.T

    def of(self, value):
        """The same with the library's tensors in place of NumPy's; reaches into dataclasses."""
        return map_arrays(value, self.make)


def map_arrays(value, change, kind=np.ndarray):
    """A copy of nested dataclasses, dicts and lists with each array of a kind changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: map_arrays(item, change, kind) for name, item in value.items()}
    if isinstance(value, list):
        return [map_arrays(item, change, kind) for item in value]
    if isinstance(value, CacheSpec) or not is_dataclass(value):
        return value
    parts = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    return replace(value, **{name: map_arrays(item, change, kind) for name, item in parts.items()})


def paths_to_arrays(value, at=()):
    """The way to each array within: names of arguments and fields."""
    if isinstance(value, dict):
        parts = value
    elif is_dataclass(value) and not isinstance(value, CacheSpec):
        parts = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        return [at]
    else:
        return []
    return [path for name, part in parts.items() for path in paths_to_arrays(part, (*at, name))]


def at_path(value, path):
    for name in path:
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def put_at(value, path, new):
    """A copy with another value at a path."""
    if not path:
        return new
    name, rest = path[0], path[1:]
    changed = put_at(at_path(value, (name,)), rest, new)
    return value | {name: changed} if isinstance(value, dict) else replace(value, **{name: changed})


def random_bits(rng, dtype, shape):
    """An array of a dtype with random bits; those of bool are 0 and 1."""
    dtype = arrays.numpy_dtype(dtype)
    high = 2 if dtype.kind == "b" else 2 ** (8 * dtype.itemsize)
    return rng.integers(0, high, shape, f"u{dtype.itemsize}").view(dtype)


def calls(batch, rng):
    """The arguments of every op on a batch, each tensor argument given."""
    spec, cache = batch.cache.spec, batch.cache
    heads, dim, rows = spec.num_kv_heads, spec.head_dim, len(batch.qkv)
    dtype = batch.qkv.dtype

    def random(*shape):
        return rng.standard_normal(shape).astype(np.float32).astype(dtype)

    def random32(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    total = sum(batch.lengths)
    contiguous = {"cu_seqlens_k": running_sum(batch.lengths)}
    outs = {name: np.full((total, heads, dim), np.nan, dtype) for name in ("out_k", "out_v")}
    lengths = np.array(batch.lengths, np.int32)
    ends = np.resize(np.repeat(lengths, batch.new), rows)  # padding rows have any
    offsets = np.stack([rng.integers(0, 3, len(ends)), ends], axis=1).astype(np.int32)
    sinks = random32(batch.query_heads)
    queries = (rows, batch.query_heads, dim)
    pages = np.array(sorted({page for _, _, page, _ in batch.owned("all")})[:2], np.int32)
    spare = np.setdiff1d(np.arange(len(cache.k), dtype=np.int32), batch.block_table)[: len(pages)]
    return {
        "rope_write_kv": {
            "qkv": batch.qkv, "cache": cache, **batch.meta, **contiguous, **outs,
            "rope": batch.rope, "q_norm_weight": random(dim), "k_norm_weight": random(dim),
            "return_kv": True,
        },
        "gather_kv": {
            "cache": cache, "cache_seqlens": lengths, "block_table": batch.block_table,
            **contiguous, **outs,
        },
        "paged_attention": {
            "q": random(*queries), "cache": cache, **batch.meta, "sinks": sinks, "soft_cap": 30.0,
            "mask_offsets": offsets, "return_lse": True, "out": np.full(queries, np.nan, dtype),
        },
        "masked_attention": {
            "q": random(*queries), "k": random(total, heads, dim), "v": random(total, heads, dim),
            "cu_seqlens_q": batch.cu_seqlens_q, **contiguous, "mask_offsets": offsets,
            "sinks": sinks, "return_lse": True, "out": np.full(queries, np.nan, dtype),
        },
        "merge_states": {
            "out_a": random(*queries), "lse_a": random32(*queries[:2]),
            "out_b": random(*queries), "lse_b": random32(*queries[:2]),
        },
        "copy_pages": {"cache": cache, "src": pages, "dst": spare},
    }  # fmt: skip


POSITIONAL = {
    "rope_write_kv": ("qkv", "cache"),
    "gather_kv": ("cache",),
    "paged_attention": ("q", "cache"),
    "masked_attention": ("q", "k", "v"),
    "merge_states": ("out_a", "lse_a", "out_b", "lse_b"),
    "copy_pages": ("cache", "src", "dst"),
}
OPS = tuple(POSITIONAL)


def call(op, given):
    """Call an op; returns its results as a tuple."""
    given = dict(given)
    positional = [given.pop(name) for name in POSITIONAL[op]]
    results = getattr(ops, op)(*positional, **given)
    return results if isinstance(results, tuple) else () if results is None else (results,)


class ArraySuite:
    """Tests of one library."""

    tensors: Tensors

    @pytest.fixture
    def rng(self):
        return np.random.default_rng(20240607)

    # Descriptions

    @pytest.mark.parametrize("dtype", DTYPES + MORE_DTYPES)
    @pytest.mark.parametrize("shape", [(), (1,), (3, 4), (2, 0, 5), (1, 2, 3, 4)])
    def test_describe(self, rng, dtype, shape):
        tensor = self.tensors.make(random_bits(rng, dtype, shape))
        info = arrays.describe(tensor)
        assert info == (self.tensors.name, "cpu", dtype, shape, True)
        assert type(info.shape) is tuple

    # Views

    @pytest.mark.parametrize("dtype", DTYPES + MORE_DTYPES)
    def test_view_lies_on_the_tensor(self, rng, dtype):
        host = random_bits(rng, dtype, (3, 4))
        tensor = self.tensors.make(host)
        view = arrays.to_host(tensor)
        assert type(view) is np.ndarray
        assert view.ctypes.data == self.tensors.address(tensor) != host.ctypes.data
        assert (view.dtype, view.shape) == (arrays.numpy_dtype(dtype), (3, 4))
        assert_same_bits(view, host)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_writes_are_seen_both_ways(self, rng, dtype):
        first, second = random_bits(rng, dtype, (3, 4)), random_bits(rng, dtype, (3, 4))
        tensor = self.tensors.make(first)
        view = arrays.to_host(tensor)
        view[...] = second
        assert_same_bits(self.tensors.bits(tensor), second)
        third = random_bits(rng, dtype, (3, 4)).view(f"u{view.itemsize}")
        self.tensors.overwrite(tensor, third)
        assert_same_bits(view, third)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8", "int32"])
    @pytest.mark.parametrize("name", SLICES)
    def test_view_of_a_slice(self, rng, dtype, name):
        host = random_bits(rng, dtype, (5, 6, 4))
        whole = self.tensors.make(host)
        tensor, want = whole[SLICES[name]], host[SLICES[name]]
        self.assert_view(tensor, whole, host, want)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
    def test_view_of_a_transposed_tensor(self, rng, dtype):
        host = random_bits(rng, dtype, (5, 6))
        whole = self.tensors.make(host)
        self.assert_view(self.tensors.transpose(whole), whole, host, host.T)

    def assert_view(self, tensor, whole, host, want):
        view = arrays.to_host(tensor)
        offset = want.ctypes.data - host.ctypes.data
        assert view.ctypes.data == self.tensors.address(tensor)
        assert view.ctypes.data == self.tensors.address(whole) + offset
        assert view.strides == want.strides
        assert_same_bits(view, want)
        view.view(f"u{view.itemsize}")[...] ^= 1
        want.view(f"u{view.itemsize}")[...] ^= 1
        assert_same_bits(self.tensors.bits(whole), host)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 2)])
    def test_view_of_an_empty_tensor(self, dtype, shape):
        tensor = self.tensors.make(np.zeros(shape, arrays.numpy_dtype(dtype)))
        view = arrays.to_host(tensor)
        assert (view.shape, view.dtype) == (shape, arrays.numpy_dtype(dtype))

    def test_view_keeps_the_memory(self, rng):
        host = random_bits(rng, "float32", (512, 513))
        view = arrays.to_host(self.tensors.make(host))
        gc.collect()
        others = [self.tensors.make(np.zeros((512, 513), np.float32)) for _ in range(8)]
        assert_same_bits(view, host)
        assert len(others) == 8

    # Tensors over NumPy's memory

    @pytest.mark.parametrize("dtype", DTYPES + MORE_DTYPES)
    def test_tensor_over_an_array_shares_its_memory(self, rng, dtype):
        host = random_bits(rng, dtype, (3, 4))
        tensor = arrays.from_host(host, self.tensors.name)
        assert arrays.describe(tensor) == (self.tensors.name, "cpu", dtype, (3, 4), True)
        assert self.tensors.has_dtype(tensor, dtype)
        assert self.tensors.address(tensor) == host.ctypes.data
        assert arrays.to_host(tensor).ctypes.data == host.ctypes.data
        assert_same_bits(self.tensors.bits(tensor), host)
        host[...] = random_bits(rng, dtype, (3, 4))
        assert_same_bits(self.tensors.bits(tensor), host)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
    @pytest.mark.parametrize("name", SLICES)
    def test_tensor_over_a_slice(self, rng, dtype, name):
        part = random_bits(rng, dtype, (5, 6, 4))[SLICES[name]]
        tensor = arrays.from_host(part, self.tensors.name)
        assert self.tensors.address(tensor) == part.ctypes.data
        want = tuple(stride // part.itemsize for stride in part.strides)
        assert self.tensors.strides(tensor) == want
        assert_same_bits(self.tensors.bits(tensor), part)

    def test_tensor_keeps_the_memory(self, rng):
        host = random_bits(rng, "float32", (512, 513))
        want = host.copy()
        tensor = arrays.from_host(host, self.tensors.name)
        del host
        gc.collect()
        others = [np.zeros((512, 513), np.float32) for _ in range(8)]
        assert_same_bits(self.tensors.bits(tensor), want)
        assert len(others) == 8

    # Copies and new tensors

    @pytest.mark.parametrize("dtype", DTYPES + MORE_DTYPES)
    @pytest.mark.parametrize("shape", [(), (3, 4), (0, 2)])
    def test_convert_copies(self, rng, dtype, shape):
        host = random_bits(rng, dtype, shape)
        tensor = arrays.convert(host, self.tensors.name)
        assert arrays.describe(tensor)[:4] == (self.tensors.name, "cpu", dtype, shape)
        assert_same_bits(self.tensors.bits(tensor), host)
        back = arrays.convert(tensor, "numpy")
        assert type(back) is np.ndarray
        assert_same_bits(back, host)
        if host.size:
            assert self.tensors.address(tensor) != host.ctypes.data
            assert back.ctypes.data != self.tensors.address(tensor)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(3, 4), (0, 2), (1,)])
    def test_zeros(self, dtype, shape):
        for _ in range(3):  # memory that was freed comes back
            tensor = arrays.zeros(self.tensors.name, shape, dtype)
            assert arrays.describe(tensor) == (self.tensors.name, "cpu", dtype, shape, True)
            assert self.tensors.has_dtype(tensor, dtype)
            assert not self.tensors.bits(tensor).any()
            arrays.to_host(tensor).view(np.uint8)[...] = 255
            beside = arrays.zeros_like(arrays.describe(tensor), (2, 5), "bfloat16")
            assert arrays.describe(beside) == (self.tensors.name, "cpu", "bfloat16", (2, 5), True)
            assert not self.tensors.bits(beside).any()

    @pytest.mark.parametrize("dtype", ["float64", "nothing", "", "bf16"])
    def test_zeros_of_other_dtypes_are_refused(self, dtype):
        with pytest.raises(
            UnknownNameError, match=f"zeros: dtype: expected one of .*got '{dtype}'"
        ):
            arrays.zeros(self.tensors.name, (2,), dtype)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_allocate(self, dtype):
        formats = ("block_wise_fp8", "none", "cache_int8", "cache_int4_zp", "cache_fp8")
        spec = CacheSpec(5, 3, 64, 16, formats, dtype, scale_dtype="float16")
        caches = spec.allocate(4, self.tensors.name)
        for cache, tensor in zip(caches, spec.tensors(4), strict=True):
            assert arrays.describe(cache)[:4] == (
                self.tensors.name,
                "cpu",
                tensor.dtype,
                tensor.shape,
            )
            assert self.tensors.has_dtype(cache, tensor.dtype)
            assert not self.tensors.bits(cache).any()
        assert len({self.tensors.address(cache) for cache in caches}) == len(caches)
        paged = sum(self.tensors.bits(cache).nbytes for cache in caches)
        assert spec.total_bytes(4) - spec.static_bytes() == paged

    # Ops

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize(("fmt", "granularity"), VARIANTS)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_op_gives_what_it_gives_on_numpy(self, rng, op, fmt, granularity, dtype):
        batch = make_batch(
            rng, fmt, granularity, dtype=dtype, qkv_dtype=dtype, static_dtype=dtype, padding=2,
            scale_dtype="float32" if dtype == "float16" else dtype,
        ).fill(rng)  # fmt: skip
        on_numpy = map_arrays(calls(batch, rng)[op], np.copy)
        given = self.tensors.of(on_numpy)
        before = {
            path: self.tensors.bits(at_path(given, path)).copy() for path in paths_to_arrays(given)
        }
        want, got = call(op, on_numpy), call(op, given)
        assert len(got) == len(want)
        for result, wanted in zip(got, want, strict=True):
            info = arrays.describe(result)
            assert info[:4] == (self.tensors.name, "cpu", wanted.dtype.name, wanted.shape)
            assert type(result) is type(self.tensors.make(wanted))
            assert_same_bits(self.tensors.bits(result), wanted)
        if "out" in given:
            assert got[0] is given["out"]
        written = set()
        for path in paths_to_arrays(given):
            after = self.tensors.bits(at_path(given, path))
            assert_same_bits(after, at_path(on_numpy, path))
            if (after != before[path]).any():
                written.add(path[-1])
        assert written == self.written_by(op, fmt)

    @staticmethod
    def written_by(op, fmt):
        cache = {"k", "v"} | ({"k_scale", "v_scale"} if fmt == "block_wise_fp8" else set())
        return {
            "rope_write_kv": cache | {"out_k", "out_v"},
            "gather_kv": {"out_k", "out_v"},
            "paged_attention": {"out"},
            "masked_attention": {"out"},
            "merge_states": set(),
            "copy_pages": cache,
        }[op]

    @pytest.mark.parametrize("fmt", ["cache_int8", "cache_fp8", "block_wise_fp8"])
    def test_bytes_serve_where_the_storage_dtype_is_missing(self, rng, fmt):
        batch = make_batch(rng, fmt)
        as_bytes = {name: getattr(batch.cache, name).view(np.uint8) for name in ("k", "v")}
        on_numpy = map_arrays({"cache": batch.cache, **batch.meta, "qkv": batch.qkv}, np.copy)
        given = self.tensors.of(
            {**on_numpy, "cache": replace(map_arrays(batch.cache, np.copy), **as_bytes)}
        )
        call("rope_write_kv", on_numpy)
        call("rope_write_kv", given)
        for name in ("k", "v"):
            assert self.tensors.has_dtype(getattr(given["cache"], name), "uint8")
            assert_same_bits(
                self.tensors.bits(getattr(given["cache"], name)), getattr(on_numpy["cache"], name)
            )

    @pytest.mark.parametrize("backend", ["append", "flash", "flash_mask"])
    @pytest.mark.parametrize(("fmt", "granularity"), VARIANTS)
    def test_mixed_batch_gives_what_it_gives_on_numpy(self, rng, backend, fmt, granularity):
        batch = make_batch(
            rng, fmt, granularity, cached=(21, 40, 0, 17, 0, 3), new=(1, 3, 12, 9, 0, 1),
            dtype="bfloat16", qkv_dtype="bfloat16", padding=1,
        ).fill(rng, "cached")  # fmt: skip
        spec, names = batch.cache.spec, ("k", "v", "k_scale", "v_scale")
        caches = [getattr(batch.cache, name) for name in names[: spec.num_tensors]]
        meta = BatchMeta(
            caches, spec, **batch.meta, rope=batch.rope, num_decode=2,
            cu_seqlens_k=running_sum(batch.lengths), total_k=sum(batch.lengths),
        )  # fmt: skip
        sinks = rng.standard_normal(batch.query_heads).astype(np.float32)
        on_numpy = map_arrays(
            {"meta": meta, "static": batch.cache.static, "sinks": sinks, "qkv": batch.qkv}, np.copy
        )
        given = self.tensors.of(on_numpy)
        outs = []
        for step in (on_numpy, given):
            layer = SimpleNamespace(
                layer_id=0,
                cache_quant_type_str=fmt,
                static_scales=step["static"],
                sinks=step["sinks"],
            )
            outs.append(
                get_backend(spec, name=backend).forward_mixed(step["qkv"], layer, step["meta"])
            )
        assert arrays.describe(outs[1])[:3] == (self.tensors.name, "cpu", "bfloat16")
        assert_same_bits(self.tensors.bits(outs[1]), outs[0])
        assert np.asarray(outs[0], np.float32).any()
        for mine, theirs, poisoned in zip(
            given["meta"].caches, on_numpy["meta"].caches, caches, strict=True
        ):
            assert_same_bits(self.tensors.bits(mine), theirs)
            assert (self.tensors.bits(mine) != poisoned.view(f"u{poisoned.itemsize}")).any()

    # Static scales

    @pytest.mark.parametrize(("fmt", "granularity"), [v for v in VARIANTS if v[1]])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_static_scales(self, rng, tmp_path, fmt, granularity, dtype):
        spec = CacheSpec(1, 4, 8, 2, fmt)
        host = static_scales(rng, fmt, 4, 8, granularity, dtype)
        scales = host.to(self.tensors.name)
        assert scales.validate(spec) == host.validate(spec) == ()
        save_scales(tmp_path / "f", {0: scales})
        loaded = load_scales(tmp_path / "f", spec)[0]
        part, host_part = scales.shard(spec, 1, 2), host.shard(spec, 1, 2)
        for name in FIELDS:
            if (array := getattr(host, name)) is None:
                assert getattr(scales, name) is getattr(part, name) is getattr(loaded, name) is None
                continue
            assert arrays.describe(getattr(scales, name))[:3] == (self.tensors.name, "cpu", dtype)
            assert_same_bits(self.tensors.bits(getattr(scales, name)), array)
            assert_same_bits(getattr(loaded, name), array)
            assert_same_bits(self.tensors.bits(getattr(part, name)), getattr(host_part, name))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_calibration_takes_observed_tensors(self, rng, dtype):
        low, high = (
            sign * (1 + rng.random((3, 8))).astype(arrays.numpy_dtype(dtype)) for sign in (-1, 1)
        )
        mine = [self.tensors.make(x) for x in (low, high)]
        for fmt in ("cache_int4_zp", "cache_int8"):
            got = StaticScales.from_minmax(*mine, *mine, fmt)
            want = StaticScales.from_minmax(
                *2 * [low.astype(np.float32), high.astype(np.float32)], fmt
            )
            for name in FIELDS:
                if getattr(want, name) is not None:
                    assert_same_bits(getattr(got, name), getattr(want, name))


class ForeignArraySuite(ArraySuite):
    """Tests of a library that is not NumPy."""

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("fmt", ["cache_int4_zp", "block_wise_fp8"])
    def test_no_call_mixes_libraries(self, rng, op, fmt):
        batch = make_batch(rng, fmt, qkv_dtype="bfloat16").fill(rng)
        on_numpy = calls(batch, rng)[op]
        given = self.tensors.of(on_numpy)
        paths = paths_to_arrays(given)
        before = {path: self.tensors.bits(at_path(given, path)).copy() for path in paths}
        for path in paths:
            mixed = put_at(given, path, at_path(on_numpy, path).copy())
            with pytest.raises(PlacementError) as caught:
                call(op, mixed)
            assert caught.value.op == op
            assert self.tensors.name in str(caught.value)
        for path in paths:
            assert_same_bits(self.tensors.bits(at_path(given, path)), before[path])
