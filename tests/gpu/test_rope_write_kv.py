# SPDX-License-Identifier: Apache-2.0
"""`rope_write_kv` on a GPU against the reference: every byte of the cache, and every result."""

from dataclasses import replace

import numpy as np
import pytest

from fastkv import Rope, ops
from fastkv.errors import UnsupportedError
from helpers import gpu
from helpers.batches import VARIANTS, case_id, clone, floats, make_batch, running_sum
from helpers.gpu import LIBRARIES, assert_same, assert_same_cache, poisoned, put

# Each format, static granularity, head dim, page size and dtype; G from 1 to 16.
CASES = [
    ("none", None, 128, 16, 4, 2, "bfloat16", "bfloat16", "float32"),
    ("none", None, 64, 32, 1, 3, "float16", "float16", "float32"),
    ("none", None, 256, 64, 2, 1, "bfloat16", "float32", "float32"),
    ("cache_int8", "head", 128, 64, 4, 8, "bfloat16", "bfloat16", "float32"),
    ("cache_int8", "channel", 96, 16, 3, 2, "float16", "float16", "bfloat16"),
    ("cache_int8", "flat", 64, 128, 16, 1, "float32", "float32", "float32"),
    ("cache_fp8", "head", 128, 16, 4, 2, "bfloat16", "bfloat16", "bfloat16"),
    ("cache_fp8", "head", 256, 32, 8, 1, "float16", "float16", "float32"),
    ("cache_int4_zp", "channel", 128, 64, 4, 2, "bfloat16", "bfloat16", "float32"),
    ("cache_int4_zp", "flat", 96, 128, 2, 3, "float32", "float32", "float16"),
    ("cache_int4_zp", "channel", 64, 16, 7, 2, "float16", "float16", "float32"),
    ("block_wise_fp8", None, 128, 16, 4, 2, "bfloat16", "bfloat16", "float32"),
    ("block_wise_fp8", None, 96, 64, 1, 2, "float16", "float32", "bfloat16"),
    ("block_wise_fp8", None, 256, 128, 3, 1, "float32", "float16", "float16"),
]
_NAMES = ("fmt", "granularity", "head_dim", "page_size", "group", "kv_heads")
_DTYPES = ("dtype", "qkv_dtype", "static_dtype")


def arguments(case):
    named = dict(zip(_NAMES + _DTYPES, case, strict=True))
    return named | {"scale_dtype": named["static_dtype"]}


def libraries_of(case):
    """CuPy may lack bfloat16."""
    return "torch" if "bfloat16" in case else "cupy"


def run_both(batch, library, cache_on_gpu=put, **options):
    """The op on copies in NumPy and on the GPU; returns both results and caches."""
    there = batch.with_(cache=cache_on_gpu(batch.cache, library))
    on_gpu = put(options, library)
    got = ops.rope_write_kv(
        put(batch.qkv, library), there.cache, **put(batch.meta, library), **on_gpu
    )
    here = batch.with_(cache=clone(batch.cache))
    want = ops.rope_write_kv(batch.qkv, here.cache, **batch.meta, **options)
    return (got, there.cache, on_gpu), (want, here.cache, options)


def assert_both_same(got, want):
    """Results, caches, `out_k` and `out_v` alike."""
    (results, cache, options), (wanted, wanted_cache, wanted_options) = got, want
    if not isinstance(wanted, tuple):
        results, wanted = (results,), (wanted,)
    for tensor, array in zip(results, wanted, strict=True):
        assert_same(tensor, array)
    assert_same_cache(cache, wanted_cache)
    for name in ("out_k", "out_v"):
        if name in wanted_options:
            assert_same(options[name], wanted_options[name])


def contiguous_outs(batch, dtype):
    rows = sum(batch.lengths)
    spec = batch.cache.spec
    shape = (rows, spec.num_kv_heads, spec.head_dim)
    outs = {"out_k": poisoned(shape, dtype), "out_v": poisoned(shape, dtype)}
    return outs | {"cu_seqlens_k": running_sum(batch.lengths)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case_id(arguments(case)))
def test_every_byte_is_the_references(case):
    batch = make_batch(np.random.default_rng(7), padding=2, **arguments(case))
    assert_both_same(*run_both(batch, libraries_of(case), rope=batch.rope))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("variant", VARIANTS[::2], ids=str)
def test_k_and_v_come_back_unquantized(library, variant):
    batch = make_batch(np.random.default_rng(11), *variant, padding=1, first_row=2)
    options = {"rope": batch.rope, "return_kv": True, **contiguous_outs(batch, "float16")}
    assert_both_same(*run_both(batch, library, **options))


def test_an_empty_segment_takes_no_part():
    batch = make_batch(np.random.default_rng(13), cached=(5, 3, 0), new=(2, 4, 3))
    outs = contiguous_outs(batch, "float32") | {"cu_seqlens_k": np.array([0, 7, 7, 10], np.int32)}
    assert_both_same(*run_both(batch, "torch", rope=batch.rope, **outs))


@pytest.mark.parametrize(
    ("rotary_dim", "interleaved"),
    [(64, True), (32, False), (16, True), (20, False), (10, True)],
)
def test_rotations(rotary_dim, interleaved):
    rng = np.random.default_rng(17)
    batch = make_batch(rng, "cache_int8", rotary_dim=rotary_dim, interleaved=interleaved)
    assert_both_same(*run_both(batch, "torch", rope=batch.rope))


@pytest.mark.parametrize("norms", ["q", "k", "qk"])
@pytest.mark.parametrize("norm_after_rope", [False, True])
@pytest.mark.parametrize(("fmt", "head_dim"), [("cache_fp8", 128), ("block_wise_fp8", 96)])
def test_norm(norms, norm_after_rope, fmt, head_dim):
    # The reference's order of the sum, and no contraction: bitwise here too.
    rng = np.random.default_rng(19)
    batch = make_batch(rng, fmt, head_dim=head_dim, qkv_dtype="float16")
    weights = {f"{x}_norm_weight": 1 + floats(rng, head_dim, "float16", 0.3) for x in norms}
    options = {"norm_eps": 1e-5, "norm_after_rope": norm_after_rope, **weights}
    assert_both_same(*run_both(batch, "cupy", rope=batch.rope, **options))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_norm_of_partly_rotated_heads(head_dim):
    rng = np.random.default_rng(23)
    batch = make_batch(rng, head_dim=head_dim, rotary_dim=32, group=5, kv_heads=1)
    weights = {"q_norm_weight": floats(rng, head_dim), "k_norm_weight": floats(rng, head_dim)}
    assert_both_same(*run_both(batch, "torch", rope=batch.rope, **weights))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nan_infinity_and_zero_rows(variant):
    batch = make_batch(np.random.default_rng(29), *variant, new=(4, 5, 9))
    heads = batch.qkv.reshape(len(batch.qkv), -1, 64)
    kv = heads[:, 6:]
    kv[0, :, 3] = np.nan
    kv[1, :, 5], kv[2, :, 7] = np.inf, -np.inf
    kv[3] = 0
    kv[4] = -0.0
    kv[5, 0, 0], kv[6] = 1e30, 3e-30
    assert_both_same(*run_both(batch, "torch"))


@pytest.mark.parametrize("variant", VARIANTS[::2], ids=str)
def test_rows_of_nobody_and_no_requests(variant):
    rng = np.random.default_rng(31)
    for cached, new in (((), ()), ((4, 0), (0, 0)), ((4, 7), (0, 3))):
        batch = make_batch(rng, *variant, cached=cached, new=new, padding=3, first_row=1)
        batch.qkv[:1], batch.qkv[-3:] = np.nan, np.inf
        assert_both_same(*run_both(batch, "torch", rope=batch.rope, return_kv=True))


@pytest.mark.parametrize("requests", [1, 32, 33, 1500])
def test_the_owner_of_a_row_is_found_among_many(requests):
    rng = np.random.default_rng(37)
    new = rng.integers(0, 3, requests)
    batch = make_batch(rng, cached=rng.integers(0, 40, requests), new=new, kv_heads=1, padding=2)
    assert_both_same(*run_both(batch, "torch", rope=batch.rope))


@pytest.mark.parametrize("variant", VARIANTS[::2], ids=str)
def test_writes_to_page_minus_one_are_dropped(variant):
    batch = make_batch(np.random.default_rng(41), *variant, cached=(3, 30), new=(20, 5))
    batch.block_table[0, 0] = -1
    assert_both_same(*run_both(batch, "cupy", rope=batch.rope))


@pytest.mark.parametrize("layout", gpu.LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS[::2], ids=str)
def test_strided_caches_are_served(layout, variant):
    batch = make_batch(np.random.default_rng(43), *variant)
    assert_both_same(*run_both(batch, "torch", gpu.LAYOUTS[layout], rope=batch.rope))


@pytest.mark.parametrize("variant", VARIANTS[::2], ids=str)
@pytest.mark.parametrize("bad", [-2, "N", 2**30, -(2**31)])
def test_page_ids_out_of_range_write_nothing(variant, bad):
    batch = make_batch(np.random.default_rng(47), *variant)
    wrong, dropped = batch.block_table.copy(), batch.block_table.copy()
    wrong[1, 0] = len(batch.cache.k) if bad == "N" else bad
    dropped[1, 0] = -1
    got, _ = run_both_of(batch, batch.with_(block_table=wrong))
    _, want = run_both_of(batch, batch.with_(block_table=dropped))
    assert_both_same(got, want)


def run_both_of(batch, other):
    """The GPU's side of one batch; the reference where it accepts it."""
    got = (None, put(batch.cache, "torch"), {})
    q = ops.rope_write_kv(
        put(other.qkv, "torch"), got[1], **put(other.meta, "torch"), rope=put(other.rope, "torch")
    )
    cache = clone(batch.cache)
    try:
        want = ops.rope_write_kv(other.qkv, cache, **other.meta, rope=other.rope)
    except ValueError:
        want = None
    return (q, *got[1:]), (want, cache, {})


@pytest.mark.parametrize("length", [-1, 10**6, 2**31 - 1, -(2**31)])
def test_lengths_out_of_range_write_nothing_of_that_request(length):
    batch = make_batch(np.random.default_rng(53), "cache_int8")
    lengths = batch.cache_seqlens.copy()
    lengths[1] = length
    dropped = batch.block_table.copy()
    dropped[1] = -1
    got, _ = run_both_of(batch, batch.with_(cache_seqlens=lengths))
    _, want = run_both_of(batch, batch.with_(block_table=dropped))
    assert_same_cache(got[1], want[1])
    others = np.r_[0:1, 5 : len(batch.qkv)]
    assert_same(got[0][others], want[0][others])


def test_positions_past_the_tables_write_nothing_elsewhere():
    batch = make_batch(np.random.default_rng(59))
    short = replace(batch.rope, cos=batch.rope.cos[:20], sin=batch.rope.sin[:20])
    got, _ = run_both_of(batch, batch.with_(rope=short))
    _, want = run_both_of(batch, batch)
    assert_same(got[1].v, want[1].v)
    assert_same(got[0][:5], want[0][:5])


def test_a_cu_seqlens_q_that_decreases_ends_and_stays_within_the_cache():
    batch = make_batch(np.random.default_rng(61), cached=(5, 0, 9), new=(4, 4, 4))
    for sums in ([0, 12, 3, 9], [5, 4, 3, 2], [-7, 40, -40, 99], [2**31 - 1, 0, 0, 12]):
        got, _ = run_both_of(batch, batch.with_(cu_seqlens_q=np.array(sums, np.int32)))
        owned = np.zeros(batch.cache.k.shape[:1], bool)
        owned[batch.block_table[batch.block_table >= 0]] = True
        assert_same(got[1].k[np.flatnonzero(~owned)], batch.cache.k[~owned])


@pytest.mark.parametrize("argument", ["qkv", "head_dim", "norm"])
def test_what_the_kernel_does_not_serve_is_refused_by_name(argument):
    rng = np.random.default_rng(67)
    batch = make_batch(rng, head_dim=24 if argument == "head_dim" else 64)
    there = put(batch.cache, "torch")
    before = gpu.fetch(there.k)
    qkv, weight = put(batch.qkv, "torch"), None
    if argument == "qkv":
        qkv = put(np.repeat(batch.qkv, 2, axis=1), "torch")[:, ::2]
    if argument == "norm":
        weight = put(floats(rng, 65), "torch")[1:]
    name = {"qkv": "qkv", "head_dim": "D", "norm": "q_norm_weight"}[argument]
    with pytest.raises(UnsupportedError, match="on a GPU") as error:
        ops.rope_write_kv(qkv, there, **put(batch.meta, "torch"), q_norm_weight=weight)
    assert error.value.argument == name
    assert_same(there.k, before)


def test_a_captured_graph_replays_as_lengths_grow_torch():
    import torch

    batch = make_batch(np.random.default_rng(71), "block_wise_fp8", new=(1, 1, 1))
    batch = batch.with_(rope=Rope.from_theta(10000.0, 64, 64))
    rope = put(batch.rope, "torch")
    qkv, meta = put(batch.qkv, "torch"), put(batch.meta, "torch")
    cache = put(batch.cache, "torch")
    ops.rope_write_kv(qkv, put(batch.cache, "torch"), **meta, rope=rope)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = ops.rope_write_kv(qkv, cache, **meta, rope=rope)
    want = clone(batch.cache)
    for step in range(2):
        later = batch.with_(cache_seqlens=batch.cache_seqlens + np.int32(step))
        meta["cache_seqlens"].copy_(put(later.cache_seqlens, "torch"))
        graph.replay()
        torch.cuda.synchronize()
        wanted = ops.rope_write_kv(batch.qkv, want, **later.meta, rope=batch.rope)
        assert_same(q, wanted)
    assert_same_cache(cache, want)


def test_a_captured_graph_replays_cupy():
    import cupy

    batch = make_batch(np.random.default_rng(73), "cache_int4_zp")
    rope, cache = put(batch.rope, "cupy"), put(batch.cache, "cupy")
    qkv, meta = put(batch.qkv, "cupy"), put(batch.meta, "cupy")
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device(0).synchronize()
    with stream:
        # Compiles, and leaves memory in the pool: nothing can be allocated within a capture.
        ops.rope_write_kv(qkv, put(batch.cache, "cupy"), **meta, rope=rope)
        stream.synchronize()
        stream.begin_capture()
        q = ops.rope_write_kv(qkv, cache, **meta, rope=rope)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    want = clone(batch.cache)
    assert_same(q, ops.rope_write_kv(batch.qkv, want, **batch.meta, rope=batch.rope))
    assert_same_cache(cache, want)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_stream_of_the_callers(library):
    # The data arrive late on the caller's stream: an op on any other would read zeros.
    batch = make_batch(np.random.default_rng(79), "cache_int8")
    meta, rope = put(batch.meta, library), put(batch.rope, library)
    cache, qkv, late = (put(x, library) for x in (batch.cache, batch.qkv, 0 * batch.qkv))
    with gpu.own_stream(library):
        gpu.keep_busy(library)
        late[...] = qkv
        q = ops.rope_write_kv(late, cache, **meta, rope=rope)
    want = clone(batch.cache)
    wanted = ops.rope_write_kv(batch.qkv, want, **batch.meta, rope=batch.rope)
    assert_same(q, wanted)
    assert_same_cache(cache, want)


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
qkv = put(np.ones((2, 6 * 64), np.float16))
batch = {"cu_seqlens_q": ints(0, 1, 2), "cache_seqlens": ints(3, 5)}
pages = {"block_table": ints(0, 1).reshape(2, 1)}
outs = {name: put(np.zeros((6, 2, 64), np.float16)) for name in ("out_k", "out_v")}
ops.rope_write_kv(qkv, cache, **batch, **pages)
# No fault: a dropped write, and a request that takes no part in out_k and out_v.
ops.rope_write_kv(qkv, cache, **batch, block_table=ints(0, -1).reshape(2, 1))
ops.rope_write_kv(qkv, cache, **batch, **pages, **outs, cu_seqlens_k=ints(0, 0, 6))
for argument, changed in {
    "block_table of request 1": {"block_table": ints(0, 9).reshape(2, 1)},
    "cache_seqlens[0] of request 0": {"cache_seqlens": ints(16, 5)},
    "cu_seqlens_q at request 1": {"cu_seqlens_q": ints(0, 2, 1)},
    "cu_seqlens_k of request 1": {**outs, "cu_seqlens_k": ints(0, 0, 5)},
}.items():
    arguments = {**batch, **pages, **changed}
    try:
        ops.rope_write_kv(qkv, cache, **arguments)
    except BatchValueError as error:
        assert error.argument == argument, error
        assert error.op == "rope_write_kv"
    else:
        raise AssertionError(f"{argument}: nothing raised")
"""
