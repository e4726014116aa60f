# SPDX-License-Identifier: Apache-2.0
"""NumPy arguments on a GPU and back; the reference on copies of the same arguments."""

from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np

from fastkv import LayerCache, Rope, StaticScales, arrays
from helpers.batches import static_scales, tensors_of
from helpers.compare import assert_same_bits
from helpers.oracle import values_of

DEVICE = "cuda:0"
LIBRARIES = ("torch", "cupy")


def put(value, library):
    """An array, or a cache, rope, bundle or dict of arrays, copied to the GPU."""
    if isinstance(value, np.ndarray):
        return arrays.convert(value, library, DEVICE)
    if isinstance(value, dict):
        return {name: put(one, library) for name, one in value.items()}
    if isinstance(value, LayerCache | StaticScales | Rope):
        inside = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **put(inside, library))
    return value


def fetch(tensor):
    """A NumPy copy of a GPU tensor."""
    if hasattr(tensor, "cpu"):
        return arrays.to_host(tensor.cpu()).copy()
    return tensor.get() if hasattr(tensor, "get") else tensor.copy()


def permuted(tensor, axes):
    """A transposed view, in any library."""
    return tensor.permute(axes) if hasattr(tensor, "permute") else tensor.transpose(axes)


def assert_same(got, want):
    """Bits alike, but for NaN, whose bits no format but fp8 fixes."""
    got = fetch(got)
    if want.dtype.name in ("bfloat16", "float16", "float32"):
        got = got.view(want.dtype)
        both = np.isnan(values_of(got)) & np.isnan(values_of(want))
        got[both] = want[both]
    assert_same_bits(got, want)


def assert_same_cache(got, want):
    """The tensors of a cache on the GPU against one in NumPy, as `assert_same`."""
    for name, tensor in tensors_of(want).items():
        assert_same(getattr(got, name), tensor)


def assert_same_bytes(got, want):
    """The tensors of a cache on the GPU against one in NumPy, every bit."""
    for name, tensor in tensors_of(want).items():
        assert_same_bits(fetch(getattr(got, name)), tensor)


def poisoned(shape, dtype="float32"):
    """Memory that shows when it was not written."""
    return np.full(shape, np.nan, arrays.numpy_dtype(dtype))


def interleaved_cache(cache, library):
    """The cache on the GPU with K and V interleaved page by page in one tensor."""
    pair = put(np.stack([cache.k, cache.v], axis=1), library)
    return replace(put(cache, library), k=pair[:, 0], v=pair[:, 1])


def token_major_cache(cache, library):
    """The cache on the GPU stored `[N, P, Hkv, D_storage]`, seen as `[N, Hkv, P, D_storage]`."""
    stored = {
        name: permuted(put(np.ascontiguousarray(t.transpose(order)), library), order)
        for name, t in tensors_of(cache).items()
        for order in [(0, 2, 1, 3)[: t.ndim]]
    }
    return replace(put(cache, library), **stored)


LAYOUTS = {"interleaved": interleaved_cache, "token_major": token_major_cache}


@contextmanager
def own_stream(library):
    """A non-blocking stream of the library as the current one; synchronized at the end."""
    if library == "torch":
        import torch

        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            yield stream
    else:
        import cupy

        cupy.cuda.Device(0).synchronize()
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            yield stream
    stream.synchronize()


def keep_busy(library):
    """Queue work of several milliseconds on the current stream."""
    if library == "torch":
        import torch

        torch.cuda._sleep(20_000_000)
    else:
        import cupy

        x = cupy.ones((2048, 2048), cupy.float32)
        for _ in range(20):
            x = x @ x * 0


def with_static(cache):
    """The cache with some static scales, where its format needs them."""
    spec = cache.spec
    fmt, rng = cache.quant.name.value, np.random.default_rng(0)
    return replace(cache, static=static_scales(rng, fmt, spec.num_kv_heads, spec.head_dim))
