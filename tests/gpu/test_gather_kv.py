# SPDX-License-Identifier: Apache-2.0
"""`gather_kv` on a GPU against the reference: every bit of both outputs."""

import numpy as np
import pytest

from fastkv import ops
from fastkv.errors import UnsupportedError
from helpers import gpu
from helpers.batches import VARIANTS, case_id, make_batch, running_sum
from helpers.gpu import LIBRARIES, assert_same, poisoned, put

# Format, static granularity, head dim, page size, KV heads; dtypes of a `none` cache, of scales, of
# the outputs.
CASES = [
    ("none", None, 128, 16, 8, "bfloat16", "float32", "bfloat16"),
    ("none", None, 64, 64, 1, "float16", "float32", "float16"),
    ("none", None, 256, 32, 3, "bfloat16", "float32", "float32"),
    ("cache_int8", "head", 128, 64, 8, "bfloat16", "float32", "bfloat16"),
    ("cache_int8", "channel", 96, 16, 2, "float32", "float16", "float16"),
    ("cache_fp8", "head", 128, 128, 8, "bfloat16", "bfloat16", "bfloat16"),
    ("cache_fp8", "head", 64, 16, 3, "float32", "float32", "float32"),
    ("cache_int4_zp", "channel", 128, 16, 8, "bfloat16", "float32", "bfloat16"),
    ("cache_int4_zp", "flat", 96, 64, 1, "float32", "float16", "float32"),
    ("cache_int4_zp", "channel", 256, 32, 2, "float32", "float32", "float16"),
    ("block_wise_fp8", None, 128, 16, 8, "bfloat16", "float32", "bfloat16"),
    ("block_wise_fp8", None, 256, 128, 1, "float32", "float16", "float16"),
]
_NAMES = ("fmt", "granularity", "head_dim", "page_size", "kv_heads", "dtype", "scale_dtype")
CACHED = (37, 0, 130, 1)


def filled(case, seed=3, cached=CACHED):
    """A batch whose cache holds random tokens, and NaN or any byte everywhere else."""
    rng = np.random.default_rng(seed)
    named = dict(zip(_NAMES, case, strict=False))
    return make_batch(
        rng, **named, static_dtype=named["scale_dtype"], cached=cached, new=[0] * len(cached)
    ).fill(rng)


def arguments(batch, out_dtype, room=2):
    """Outputs with `room` rows behind each segment's tokens, and behind all of them."""
    spec = batch.cache.spec
    sums = running_sum([n + room for n in batch.cached])
    shape = (int(sums[-1]) + room, spec.num_kv_heads, spec.head_dim)
    return {
        "cache_seqlens": batch.cache_seqlens,
        "block_table": batch.block_table,
        "cu_seqlens_k": sums,
        "out_k": poisoned(shape, out_dtype),
        "out_v": poisoned(shape, out_dtype),
    }


def assert_gathers(cache, given, library, on_gpu=None, wanted=None):
    """The GPU's outputs are the reference's, rows that nobody writes included."""
    there = put(given, library)
    ops.gather_kv(put(cache, library) if on_gpu is None else on_gpu, **there)
    want = {name: array.copy() for name, array in (wanted or given).items()}
    ops.gather_kv(cache, **want)
    for name in ("out_k", "out_v"):
        assert_same(there[name], want[name])


@pytest.mark.parametrize("case", CASES, ids=lambda c: case_id(dict(enumerate(c))))
def test_every_bit_is_the_references(case):
    batch = filled(case)
    library = "torch" if "bfloat16" in case else "cupy"
    assert_gathers(batch.cache, arguments(batch, case[-1]), library)


@pytest.mark.parametrize("layout", gpu.LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS[::2], ids=str)
def test_strided_caches_are_served(layout, variant):
    batch = filled((*variant, 64, 16, 2, "float32", "float32"))
    on_gpu = gpu.LAYOUTS[layout](batch.cache, "torch")
    assert_gathers(batch.cache, arguments(batch, "float32"), "torch", on_gpu)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("variant", VARIANTS[::2], ids=str)
def test_tokens_on_page_minus_one_read_as_zero(library, variant):
    batch = filled((*variant, 64, 16, 2, "float32", "float32"))
    batch.block_table[0, 1], batch.block_table[2, 0] = -1, -1
    assert_gathers(batch.cache, arguments(batch, "float32"), library)


@pytest.mark.parametrize("variant", VARIANTS[::2], ids=str)
def test_nan_and_infinity_are_read_as_they_are(variant):
    batch = filled((*variant, 64, 16, 2, "float32", "float32"))
    if batch.cache.k.dtype == np.float32:
        batch.cache.k[:, :, :, 0], batch.cache.v[:, :, :, 1] = np.inf, np.nan
    elif batch.cache.k_scale is not None:
        batch.cache.k_scale[:, :, ::2], batch.cache.v_scale[:, :, 1::2] = np.nan, 0
    else:  # every byte there is
        for side in (batch.cache.k, batch.cache.v):
            side.view(np.uint8)[:, :, :, :] = np.arange(side.shape[-1]) + 128 * np.arange(
                2
            ).reshape(2, 1, 1)
    assert_gathers(batch.cache, arguments(batch, "float32"), "torch")


def test_empty_segments_and_no_requests_leave_everything_alone():
    batch = filled(CASES[3])
    given = arguments(batch, "bfloat16") | {"cu_seqlens_k": np.array([2, 2, 2, 134, 134], np.int32)}
    assert_gathers(batch.cache, given, "torch")
    none = filled(CASES[3], cached=())
    assert_gathers(none.cache, arguments(none, "bfloat16"), "torch")


def test_outputs_may_be_strided():
    batch = filled(("cache_int8", None, 64, 16, 2, "float32", "float32"))
    given = arguments(batch, "float32")
    pair = put(np.stack([given["out_k"], given["out_v"]], axis=1), "torch")
    there = put(given, "torch") | {"out_k": pair[:, 0], "out_v": pair[:, 1]}
    ops.gather_kv(put(batch.cache, "torch"), **there)
    ops.gather_kv(batch.cache, **given)
    assert_same(pair[:, 0], given["out_k"])
    assert_same(pair[:, 1], given["out_v"])


def test_many_requests():
    cached = tuple(np.random.default_rng(5).integers(0, 4, 1100))
    batch = filled(("none", None, 64, 16, 1, "float16", "float32"), cached=cached)
    assert_gathers(batch.cache, arguments(batch, "float16", room=0), "torch")


@pytest.mark.parametrize("bad", [-2, "N", 2**30, -(2**31)])
def test_page_ids_out_of_range_read_as_no_page(bad):
    batch = filled(CASES[3])
    given = arguments(batch, "bfloat16")
    wrong = given["block_table"].copy()
    wrong[2, 1] = len(batch.cache.k) if bad == "N" else bad
    there = put(given | {"block_table": wrong}, "torch")
    ops.gather_kv(put(batch.cache, "torch"), **there)
    given["block_table"][2, 1] = -1
    ops.gather_kv(batch.cache, **given)
    assert_same(there["out_k"], given["out_k"])
    assert_same(there["out_v"], given["out_v"])


@pytest.mark.parametrize("length", [-1, 10**6, 2**31 - 1])
def test_lengths_out_of_range_stay_within_their_segment(length):
    batch = filled(CASES[3])
    given = arguments(batch, "bfloat16")
    lengths = batch.cache_seqlens.copy()
    lengths[2] = length
    there = put(given | {"cache_seqlens": lengths}, "torch")
    ops.gather_kv(put(batch.cache, "torch"), **there)
    ops.gather_kv(batch.cache, **given)
    own = np.zeros(len(given["out_k"]), bool)
    own[given["cu_seqlens_k"][2] : given["cu_seqlens_k"][3]] = True
    for name in ("out_k", "out_v"):
        assert_same(there[name][np.flatnonzero(~own)], given[name][~own])


def test_an_output_without_dense_heads_is_refused_by_name():
    batch = filled(("none", None, 64, 16, 2, "float16", "float32"))
    there = put(arguments(batch, "float16"), "torch")
    shape = (*there["out_k"].shape[:2], 128)
    wide = put(poisoned(shape, "float16"), "torch")
    with pytest.raises(UnsupportedError, match="on a GPU") as error:
        ops.gather_kv(put(batch.cache, "torch"), **(there | {"out_v": wide[:, :, ::2]}))
    assert error.value.argument == "out_v"
    assert_same(wide, poisoned(shape, "float16"))


def test_a_captured_graph_replays_as_lengths_grow():
    import torch

    batch = filled(CASES[10])
    given = arguments(batch, "bfloat16")
    cache, there = put(batch.cache, "torch"), put(given, "torch")
    ops.gather_kv(cache, **put(given, "torch"))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gather_kv(cache, **there)
    for shorter in (9, 0):
        lengths = np.maximum(batch.cache_seqlens - shorter, 0).astype(np.int32)
        there["cache_seqlens"].copy_(put(lengths, "torch"))
        graph.replay()
        torch.cuda.synchronize()
        ops.gather_kv(batch.cache, **(given | {"cache_seqlens": lengths}))
        assert_same(there["out_k"], given["out_k"])
        assert_same(there["out_v"], given["out_v"])


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_stream_of_the_callers(library):
    batch = filled(("cache_int8", None, 64, 16, 2, "float32", "float32"))
    given = arguments(batch, "float32")
    cache, there = put(batch.cache, library), put(given, library)
    late = put(np.zeros_like(given["cu_seqlens_k"]), library)
    with gpu.own_stream(library):
        gpu.keep_busy(library)
        late[...] = there["cu_seqlens_k"]
        ops.gather_kv(cache, **(there | {"cu_seqlens_k": late}))
    ops.gather_kv(batch.cache, **given)
    assert_same(there["out_k"], given["out_k"])


def test_write_then_gather_gives_back_what_was_written():
    # Both directions on the GPU alone: `none` is exact, so nothing may be lost or moved.
    rng = np.random.default_rng(23)
    batch = make_batch(rng, "none", cached=(0, 0, 0), new=(40, 3, 17), qkv_dtype="float32")
    there, meta = put(batch.cache, "torch"), put(batch.meta, "torch")
    ops.rope_write_kv(put(batch.qkv, "torch"), there, **meta)
    given = arguments(batch.with_(cached=batch.new), "float32", room=0)
    given["cache_seqlens"] = np.array(batch.new, np.int32)
    outs = put(given, "torch")
    ops.gather_kv(there, **outs)
    _, k, v = batch.heads(np.float32)
    assert_same(outs["out_k"], k)
    assert_same(outs["out_v"], v)


def test_faults_are_reported_when_asked_for(run_python):
    run_python(FAULTY, FASTKV_CHECK="1")


FAULTY = """
import numpy as np
from fastkv import CacheSpec, LayerCache, arrays, ops
from fastkv.errors import BatchValueError

def put(array):
    return arrays.convert(array, "cupy", "cuda:0")

spec = CacheSpec(1, 2, 64, 16, "none", "float16")
cache = LayerCache(spec, 0, *spec.allocate(4, "cupy", "cuda:0"))
ints = lambda *values: put(np.array(values, np.int32))
legal = {"cache_seqlens": ints(3, 5), "cu_seqlens_k": ints(0, 3, 9)}
legal |= {"block_table": ints(0, 1).reshape(2, 1)}
legal |= {name: put(np.zeros((9, 2, 64), np.float16)) for name in ("out_k", "out_v")}
ops.gather_kv(cache, **legal)
ops.gather_kv(cache, **{**legal, "block_table": ints(0, -1).reshape(2, 1)})
ops.gather_kv(cache, **{**legal, "cu_seqlens_k": ints(0, 0, 9)})
for argument, changed in {
    "block_table of request 1": {"block_table": ints(0, 4).reshape(2, 1)},
    "cache_seqlens[0] of request 0": {"cache_seqlens": ints(17, 5)},
    "cu_seqlens_k of request 1": {"cu_seqlens_k": ints(0, 4, 8)},
    "cu_seqlens_k of request 0": {"cu_seqlens_k": ints(-1, 3, 9)},
}.items():
    try:
        ops.gather_kv(cache, **{**legal, **changed})
    except BatchValueError as error:
        assert error.argument == argument, error
        assert error.op == "gather_kv"
    else:
        raise AssertionError(f"{argument}: nothing raised")
"""
