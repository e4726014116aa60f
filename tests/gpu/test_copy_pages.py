# SPDX-License-Identifier: Apache-2.0
"""`copy_pages` on a GPU against the reference: every byte of the cache."""

import numpy as np
import pytest

from fastkv import CacheSpec, ops
from helpers import gpu
from helpers.batches import FORMATS, clone, layer_cache
from helpers.gpu import LIBRARIES, assert_same_bytes, put

# Format, head dim, page size, KV heads, dtype of `none`, of paged scales.
CASES = [
    ("none", 128, 16, 8, "float16", "float32"),
    ("none", 96, 64, 1, "float32", "float32"),
    ("cache_int8", 64, 128, 3, "float32", "float32"),
    ("cache_fp8", 256, 32, 2, "float32", "float32"),
    ("cache_int4_zp", 128, 16, 8, "float32", "float32"),
    ("cache_int4_zp", 64, 64, 1, "float32", "float32"),
    ("block_wise_fp8", 128, 64, 8, "float32", "float32"),
    ("block_wise_fp8", 96, 16, 3, "float32", "float16"),
]
PAGES = 12


def random_cache(fmt, dim, page_size, heads, dtype, scale_dtype):
    """A cache of random bytes, NaN and all."""
    rng = np.random.default_rng(3)
    spec = CacheSpec(1, heads, dim, page_size, fmt, dtype, scale_dtype)
    cache = layer_cache(rng, spec, PAGES)
    for tensor in (cache.k, cache.v, cache.k_scale, cache.v_scale):
        if tensor is not None:
            raw = tensor.view(np.uint8)
            raw[...] = rng.integers(0, 256, raw.shape)
    return gpu.with_static(cache)


def ids(*values):
    return np.array(values, np.int32)


def assert_copies(cache, src, dst, library="torch", on_gpu=None, wanted=None):
    there = put(cache, library) if on_gpu is None else on_gpu
    ops.copy_pages(there, put(src, library), put(dst, library))
    want = clone(cache)
    ops.copy_pages(want, *(wanted or (src, dst)))
    assert_same_bytes(there, want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_byte_is_the_references(case):
    library = "torch" if "float16" in case else "cupy"
    assert_copies(random_cache(*case), ids(0, 11, 5, 0, -1, 3), ids(7, 1, 10, 9, 2, -1), library)


@pytest.mark.parametrize("layout", gpu.LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_strided_caches_are_served(layout, fmt):
    cache = random_cache(fmt, 64, 16, 2, "float32", "float32")
    on_gpu = gpu.LAYOUTS[layout](cache, "torch")
    assert_copies(cache, ids(4, 2), ids(0, 11), on_gpu=on_gpu)


def test_a_page_may_be_copied_to_itself():
    assert_copies(random_cache(*CASES[0]), ids(4, 2), ids(4, 3))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [-2, PAGES, 2**30, -(2**31)])
def test_ids_out_of_range_copy_nothing(fmt, bad):
    cache = random_cache(fmt, 64, 16, 2, "float32", "float32")
    src, dst = ids(bad, 4, 2), ids(1, bad, 0)
    assert_copies(cache, src, dst, wanted=(ids(-1, 4, 2), ids(1, -1, 0)))


def test_faults_are_reported_when_asked_for(run_python):
    run_python(FAULTY, FASTKV_CHECK="1")


FAULTY = """
import numpy as np
from fastkv import CacheSpec, LayerCache, arrays, ops
from fastkv.errors import BatchValueError

spec = CacheSpec(1, 2, 64, 16, "none", "float16")
cache = LayerCache(spec, 0, *spec.allocate(4, "cupy", "cuda:0"))
ids = lambda *values: arrays.convert(np.array(values, np.int32), "cupy", "cuda:0")
ops.copy_pages(cache, ids(0, -1), ids(1, 2))
for src, dst, argument in ((ids(0, 4), ids(1, 2), "src[1]"), (ids(0, 1), ids(-2, 2), "dst[0]")):
    try:
        ops.copy_pages(cache, src, dst)
    except BatchValueError as error:
        assert error.argument == argument, error
    else:
        raise AssertionError(f"{argument}: nothing raised")
"""


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_stream_of_the_callers(library):
    cache = random_cache(*CASES[4])
    there, src = put(cache, library), put(ids(4, 2), library)
    late = put(ids(-1, -1), library)
    dst = put(ids(5, 6), library)
    with gpu.own_stream(library):
        gpu.keep_busy(library)
        late[...] = dst
        ops.copy_pages(there, src, late)
    want = clone(cache)
    ops.copy_pages(want, ids(4, 2), ids(5, 6))
    assert_same_bytes(there, want)


def test_a_captured_graph_replays_other_pages():
    import torch

    cache = random_cache(*CASES[6])
    there, src, dst = put(cache, "torch"), put(ids(4, 2), "torch"), put(ids(5, 6), "torch")
    ops.copy_pages(put(cache, "torch"), src, dst)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.copy_pages(there, src, dst)
    want = clone(cache)
    for pages in ((5, 6), (0, 11)):
        dst.copy_(put(ids(*pages), "torch"))
        graph.replay()
        torch.cuda.synchronize()
        ops.copy_pages(want, ids(4, 2), ids(*pages))
    assert_same_bytes(there, want)
