# SPDX-License-Identifier: Apache-2.0
"""A step that some op would refuse leaves the cache as it was, whichever op that is."""

from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from fastkv import BatchMeta, CacheSpec, LayerCache, ops
from fastkv.backends import BACKEND_NAMES, get_backend
from fastkv.errors import (
    BatchValueError,
    ContractError,
    DtypeError,
    ReadOnlyError,
    ShapeError,
    SpecMismatchError,
)

HQ, HKV, D, P = 4, 2, 16, 8
GATHERING = ("flash", "flash_mask")
WITH_INTERVALS = ("append", "flash_mask")


def int32(*values):
    return np.array(values, np.int32)


@pytest.fixture
def step():
    """One decode request over 9 cached tokens, one prefill request of 5 over 3."""
    rng = np.random.default_rng(0)
    spec = CacheSpec(2, HKV, D, P, "block_wise_fp8")
    shapes = spec.tensors(6)
    caches = [rng.integers(0, 120, t.nbytes, np.uint8) for t in shapes]
    for i, t in enumerate(shapes):
        dtype = np.dtype(np.float32) if t.dtype == "float32" else np.dtype(np.uint8)
        caches[i] = caches[i].view(dtype).reshape(t.shape)
        if dtype == np.float32:
            caches[i][...] = rng.uniform(0.1, 1, t.shape)
    meta = BatchMeta(
        caches,
        spec,
        cu_seqlens_q=int32(0, 1, 6),
        cache_seqlens=int32(9, 3),
        block_table=int32([4, 1], [0, -1]),
        cu_seqlens_k=int32(0, 0, 8),
        total_k=8,
        num_decode=1,
    )
    qkv = rng.standard_normal((6, (HQ + 2 * HKV) * D)).astype(np.float32)
    layer = SimpleNamespace(layer_id=1, cache_quant_type_str="block_wise_fp8", sinks=None)
    return SimpleNamespace(meta=meta, qkv=qkv, layer=layer)


def refused(backend, step, error, argument):
    """The error of a step; every byte of the cache is as before."""
    before = [cache.tobytes() for cache in step.meta.caches]
    with pytest.raises(ContractError) as caught:
        get_backend(step.meta.spec, name=backend).forward_mixed(step.qkv, step.layer, step.meta)
    assert [cache.tobytes() for cache in step.meta.caches] == before
    assert type(caught.value) is error
    assert caught.value.argument == argument
    assert caught.value.format == "block_wise_fp8"
    return caught.value


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_the_step_is_a_good_one(step, backend):
    step.layer.sinks = np.ones(HQ, np.float32)
    if backend in WITH_INTERVALS:
        intervals = [[0, 10], [0, 4], [1, 1], [2, 6], [0, 8], [3, 8]]
        step.meta = replace(step.meta, mask_offsets=np.array(intervals, np.int32))
    before = [cache.copy() for cache in step.meta.caches]
    out = get_backend(step.meta.spec, name=backend).forward_mixed(step.qkv, step.layer, step.meta)
    assert out.shape == (6, HQ, D)
    assert np.abs(out[1]).min() > 0
    changed = [not np.array_equal(a, b) for a, b in zip(step.meta.caches, before, strict=True)]
    assert changed == 4 * [False] + 4 * [True]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(
    ("sinks", "error"),
    [
        (np.zeros(3, np.float32), ShapeError),
        (np.zeros(HQ, ml_dtypes.bfloat16), DtypeError),
        ([0.0] * HQ, DtypeError),
    ],
    ids=["shape", "dtype", "list"],
)
def test_sinks(step, backend, sinks, error):
    step.layer.sinks = sinks
    refused(backend, step, error, "sinks")


@pytest.mark.parametrize("backend", WITH_INTERVALS)
@pytest.mark.parametrize(
    ("offsets", "error", "argument"),
    [
        (np.zeros((6, 3), np.int32), ShapeError, "mask_offsets"),
        (np.zeros((5, 2), np.int32), ShapeError, "mask_offsets"),
        (np.zeros((6, 2), np.int64), DtypeError, "mask_offsets"),
        (
            int32([0, 1], [0, 1], [0, 1], [4, 3], [0, 1], [0, 1]),
            BatchValueError,
            "mask_offsets[3] of request 1",
        ),
        (int32([0, 11], *5 * [[0, 1]]), BatchValueError, "mask_offsets[0] of request 0"),
    ],
    ids=["width", "rows", "int64", "start>end", "outside"],
)
def test_intervals(step, backend, offsets, error, argument):
    step.meta = replace(step.meta, mask_offsets=offsets)
    refused(backend, step, error, argument)


@pytest.mark.parametrize("backend", GATHERING)
def test_a_prefill_request_without_a_segment(step, backend):
    """Its rows would see no key, and silently come out as zeros."""
    step.meta = replace(step.meta, cu_seqlens_k=int32(0, 0, 0), total_k=0)
    error = refused(backend, step, BatchValueError, "cu_seqlens_k[2] of request 1")
    assert "8 rows" in error.expected


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_two_requests_that_write_one_slot(step, backend):
    step.meta = replace(step.meta, cache_seqlens=int32(3, 3), block_table=int32([4, 1], [4, -1]))
    error = refused(backend, step, BatchValueError, "block_table of requests 0 and 1")
    assert error.got == "page 4, slot 3 twice"


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_prefix_shared_by_two_requests_is_fine(step, backend):
    step.meta = replace(
        step.meta,
        cache_seqlens=int32(9, 8),
        block_table=int32([4, 1], [4, 0]),
        cu_seqlens_k=int32(0, 0, 13),
        total_k=13,
    )
    out = get_backend(step.meta.spec, name=backend).forward_mixed(step.qkv, step.layer, step.meta)
    assert np.abs(out).min() > 0


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_one_tensor_standing_twice_in_a_layer(step, backend):
    step.meta = replace(step.meta, caches=step.meta.caches[:4] + 4 * [step.meta.caches[4]])
    error = refused(backend, step, SpecMismatchError, "caches[5], layer 1's v")
    assert "caches[4], layer 1's k" in error.got


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_two_views_of_one_memory(step, backend):
    caches = list(step.meta.caches)
    caches[5] = caches[4][:]
    step.meta = replace(step.meta, caches=caches)
    error = refused(backend, step, BatchValueError, "cache.v")
    assert "cache.k" in error.expected


@pytest.mark.parametrize(
    ("argument", "value"), [("meta.rope", (1, 2)), ("meta.spec", "x"), ("meta", "meta")]
)
def test_things_of_another_class(step, argument, value):
    name = argument.partition(".")[2]
    meta = replace(step.meta, **{name: value}) if name else value
    with pytest.raises(DtypeError) as caught:
        get_backend(step.meta.spec, name="append").forward_mixed(step.qkv, step.layer, meta)
    assert caught.value.argument == argument
    assert caught.value.got == type(value).__name__


def test_check_step_reads_no_library_but_the_callers():
    torch_like = SimpleNamespace(shape=(4,), dtype="float32")
    spec = CacheSpec(1, HKV, D, P, "none", "float32")
    cache = LayerCache(spec, 0, *spec.allocate(2))
    batch = {"cu_seqlens_q": int32(0, 1), "cache_seqlens": int32(0), "block_table": int32([1])}
    qkv = np.ones((1, (HQ + 2 * HKV) * D), np.float32)
    ops.check_step("mine", qkv, cache, **batch, sinks=np.ones(HQ, np.float32))
    with pytest.raises(DtypeError) as caught:
        ops.check_step("mine", qkv, cache, **batch, sinks=torch_like)
    assert (caught.value.op, caught.value.format) == ("mine", "none")


def test_overlapping_windows_of_memory_are_not_written():
    spec = CacheSpec(1, HKV, D, P, "none", "float32")
    k, v = spec.allocate(3)
    page = v.strides[0] - v.strides[1]  # each page begins within the one before
    windows = np.lib.stride_tricks.as_strided(v, v.shape, (page, *v.strides[1:]))
    before = v.tobytes()
    with pytest.raises(ReadOnlyError, match="overlaps itself"):
        ops.copy_pages(LayerCache(spec, 0, k, windows), int32(0), int32(2))
    assert v.tobytes() == before
    both = np.zeros((3, HKV, 2, P, D), np.float32)  # K and V interleaved: each has its places
    ops.copy_pages(LayerCache(spec, 0, both[:, :, 0], both[:, :, 1]), int32(0), int32(2))
