# SPDX-License-Identifier: Apache-2.0
"""`CacheSpec`: what it counts is what is allocated, and a shard is a part of the whole."""

import math
import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkv import CacheSpec, LayerCache, QuantType, ops
from fastkv.arrays import numpy_dtype
from fastkv.backends import resolve
from fastkv.errors import (
    ContractError,
    LayerIndexError,
    PlacementError,
    SpecError,
    UnknownNameError,
)
from fastkv.quant import quant_spec
from fastkv.scales.bundle import FIELDS
from helpers.batches import FORMATS, VARIANTS, make_batch, static_scales
from helpers.compare import assert_close, assert_same_bits
from helpers.sentinels import TENSORS, bare_layer

MIXED = ("cache_int8", "block_wise_fp8", "none", "cache_int4_zp", "block_wise_fp8", "cache_fp8")

# Bytes a token and layer, by hand: 2 * Hkv * D elements with Hkv = 3, D = 64, and what comes with
# them: 4 bytes of scale a head for K and for V.
PER_TOKEN = {
    "none": 768,  # 384 elements of 2 bytes
    "cache_int8": 384,
    "cache_fp8": 384,
    "cache_int4_zp": 192,  # half a byte
    "block_wise_fp8": 384 + 24,
}
# Static arrays are float32: 4 multipliers per head (12 bytes each) or channel (768 bytes each).
STATIC = {
    ("cache_int8", "head"): 48,
    ("cache_int8", "channel"): 3072,
    ("cache_fp8", "head"): 48,
    ("cache_int4_zp", "channel"): 4608,  # and 2 zero points
}
DEFAULT_GRANULARITY = {"cache_int8": "head", "cache_fp8": "head", "cache_int4_zp": "channel"}


def small(quant="none", layers=1, **changes):
    values = {"num_layers": layers, "num_kv_heads": 3, "head_dim": 64, "page_size": 16}
    return CacheSpec(**(values | {"quant": quant} | changes))


# Tensors


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "scale_dtype"), [("bfloat16", "float32"), ("float32", "float16")]
)
def test_tensors_of_a_layer(fmt, dtype, scale_dtype):
    spec = small(fmt, dtype=dtype, scale_dtype=scale_dtype)
    tensors = spec.layer_tensors(0, 7)
    assert tuple(t.name for t in tensors) == TENSORS[fmt]
    storage = {"none": dtype, "cache_int8": "int8", "cache_int4_zp": "uint8"}
    dim = 32 if fmt == "cache_int4_zp" else 64
    for tensor in tensors:
        if tensor.name.endswith("_scale"):
            assert (tensor.shape, tensor.dtype) == ((7, 3, 16), scale_dtype)
        else:
            assert (tensor.shape, tensor.dtype) == (
                (7, 3, 16, dim),
                storage.get(fmt, "float8_e4m3fn"),
            )
    assert spec.storage_dtype(0) == tensors[0].dtype


def test_one_format_per_layer_sums_the_tensors_before():
    spec = small(MIXED, 6)
    assert [spec.first_index(i) for i in range(6)] == [0, 2, 6, 8, 10, 14]
    assert spec.num_tensors == 16 == len(spec.allocate(2)) == len(spec.tensors(2))
    assert [spec.layer_quant(i).name.value for i in range(6)] == list(MIXED)
    for i in range(6):
        first = spec.first_index(i)
        own = spec.layer_tensors(i, 2)
        assert spec.tensors(2)[first : first + len(own)] == own


@given(st.lists(st.sampled_from(FORMATS), min_size=1, max_size=40))
def test_first_index_is_the_running_sum(formats):
    spec = small(formats, len(formats))
    at = 0
    for i, name in enumerate(formats):
        assert spec.first_index(i) == at
        at += len(TENSORS[name])
    assert spec.num_tensors == at


@pytest.mark.parametrize("fmt", FORMATS)
def test_one_format_for_all_layers_is_the_same_as_a_list_of_it(fmt):
    one, listed = small(fmt, 4), small([fmt] * 4, 4)
    assert one == listed
    assert hash(one) == hash(listed)
    assert one.quant is QuantType(fmt)
    assert one == small(QuantType(fmt), 4) == small((QuantType(fmt),) * 4, 4)
    assert one != small(fmt, 5)


def test_a_format_per_layer_is_kept_and_compared():
    spec = small(MIXED, 6)
    assert spec.quant == tuple(MIXED)
    assert spec != small(MIXED[0], 6)
    assert spec != small(MIXED[::-1], 6)
    shard = replace(spec, num_kv_heads=1)
    assert [shard.layer_quant(i).name for i in range(6)] == list(MIXED)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_row_of_the_table_is_a_format_too(fmt):
    assert small(quant_spec(fmt), 3) == small(fmt, 3)


@pytest.mark.parametrize("quant", [*FORMATS, MIXED])
def test_spec_survives_the_way_to_a_worker_process(quant):
    layers = 1 if isinstance(quant, str) else len(quant)
    spec = pickle.loads(pickle.dumps(small(quant, layers)))
    assert spec == small(quant, layers)
    caches = [object() for _ in range(spec.num_tensors)]
    for i in range(layers):
        fmt = quant if isinstance(quant, str) else quant[i]
        assert resolve(caches, bare_layer(fmt, i), spec).k is caches[spec.first_index(i)]


def test_spec_is_frozen():
    with pytest.raises(FrozenInstanceError):
        small().num_kv_heads = 4


# Bytes


@pytest.mark.parametrize("fmt", FORMATS)
def test_bytes_per_token(fmt):
    assert small(fmt).bytes_per_token() == PER_TOKEN[fmt]
    assert type(small(fmt).bytes_per_token()) is int  # no rounding on the way
    assert small(fmt, 5).bytes_per_token() == 5 * PER_TOKEN[fmt]
    assert small(fmt, page_size=1).bytes_per_token() == PER_TOKEN[fmt]


def test_bytes_per_token_follow_the_dtypes():
    assert small(dtype="float32").bytes_per_token() == 2 * PER_TOKEN["none"]
    assert small("block_wise_fp8", scale_dtype="bfloat16").bytes_per_token() == 384 + 12
    assert small("cache_int4_zp", dtype="float32").bytes_per_token() == PER_TOKEN["cache_int4_zp"]


def test_bytes_per_token_sum_over_mixed_layers():
    assert small(MIXED, 6).bytes_per_token() == sum(PER_TOKEN[name] for name in MIXED)


@pytest.mark.parametrize(("fmt", "granularity"), STATIC)
def test_static_bytes(fmt, granularity):
    want = STATIC[fmt, granularity]
    assert small(fmt, 5).static_bytes(granularity) == 5 * want
    assert small(fmt).bytes_per_token(100, granularity) == PER_TOKEN[fmt] + want / 100
    assert small(fmt).total_bytes(7, granularity) == 7 * 16 * PER_TOKEN[fmt] + want
    if DEFAULT_GRANULARITY[fmt] == granularity:
        assert small(fmt).static_bytes() == want
        assert small(fmt).bytes_per_token(100) == PER_TOKEN[fmt] + want / 100
        assert small(fmt).total_bytes(7) == 7 * 16 * PER_TOKEN[fmt] + want


@pytest.mark.parametrize("fmt", ["none", "block_wise_fp8"])
@pytest.mark.parametrize("granularity", [None, "head", "channel"])
def test_formats_without_static_scales_take_no_static_bytes(fmt, granularity):
    assert small(fmt).static_bytes(granularity) == 0
    assert small(fmt).bytes_per_token(3, granularity) == PER_TOKEN[fmt]


@pytest.mark.parametrize("quant", [*FORMATS, MIXED])
def test_counted_bytes_are_the_allocated_bytes(quant):
    layers = 2 if isinstance(quant, str) else len(quant)
    spec = small(quant, layers, head_dim=96, page_size=32)
    caches = spec.allocate(5)
    rng = np.random.default_rng(0)
    static = 0
    for i in range(layers):
        bundle = static_scales(rng, spec.layer_quant(i).name.value, 3, 96)
        arrays = [] if bundle is None else [getattr(bundle, name) for name in FIELDS]
        static += sum(array.nbytes for array in arrays if array is not None)
    paged = sum(cache.nbytes for cache in caches)
    assert spec.total_bytes(5) == paged + static
    assert spec.bytes_per_token() * 5 * 32 == paged
    assert spec.bytes_per_token(5 * 32) == pytest.approx((paged + static) / (5 * 32), rel=1e-15)
    assert sum(tensor.nbytes for tensor in spec.tensors(5)) == paged


# Allocation


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_allocate_numpy(fmt, dtype):
    spec = small([fmt, "none"], 2, dtype=dtype, scale_dtype="bfloat16")
    caches = spec.allocate(3)
    for cache, tensor in zip(caches, spec.tensors(3), strict=True):
        assert type(cache) is np.ndarray
        assert cache.shape == tensor.shape
        assert cache.dtype == numpy_dtype(tensor.dtype)
        assert cache.flags.c_contiguous
        assert cache.flags.writeable
        assert not cache.view(np.uint8).any()
    starts = {cache.ctypes.data for cache in caches}
    assert len(starts) == len(caches), "tensors of their own"


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("fmt", FORMATS)
def test_allocated_numpy_memory_is_mapped_when_it_is_written(fmt):
    spec = CacheSpec(1, 8, 128, 64, fmt)
    before = resident_bytes()
    caches = spec.allocate(2**29 // int(64 * spec.bytes_per_token()))
    assert sum(cache.nbytes for cache in caches) > 2**28
    assert resident_bytes() - before < 2**25


def test_allocate_refuses_an_unknown_library():
    with pytest.raises(UnknownNameError, match="numpy, torch, paddle, cupy, got 'jax'"):
        small().allocate(2, "jax")


def test_allocate_refuses_a_device_numpy_lacks():
    with pytest.raises(PlacementError, match=r"expected cpu for numpy, got cuda:0"):
        small().allocate(2, "numpy", "cuda:0")


# Tensor parallelism


@given(st.integers(1, 24), st.integers(1, 48))
def test_each_head_is_on_its_ranks(heads, ranks):
    spec = small(num_kv_heads=heads)
    if heads % ranks and ranks % heads:
        with pytest.raises(SpecError) as caught:
            spec.kv_heads(0, ranks)
        assert caught.value.argument == "tp_size"
        return
    held = [spec.kv_heads(rank, ranks) for rank in range(ranks)]
    # Query head h of Hq = lcm heads reads KV head h // G; its rank must hold that head.
    query_heads = math.lcm(heads, ranks)
    group, per_rank = query_heads // heads, query_heads // ranks
    for rank, own in enumerate(held):
        read = {h // group for h in range(rank * per_rank, (rank + 1) * per_rank)}
        assert set(own) == read
        assert spec.shard(rank, ranks).num_kv_heads == len(read)
    counts = [sum(head in own for own in held) for head in range(heads)]
    assert counts == [max(1, ranks // heads)] * heads


def test_shard_keeps_everything_but_the_heads():
    spec = small(MIXED, 6, dtype="float16", scale_dtype="bfloat16", num_kv_heads=4)
    for rank in range(2):
        assert spec.shard(rank, 2) == replace(spec, num_kv_heads=2)
    assert spec.shard(5, 8) == replace(spec, num_kv_heads=1)
    assert spec.shard(0, 1) == spec


@pytest.mark.parametrize(
    ("rank", "ranks", "argument"),
    [
        (-1, 2, "tp_rank"),
        (2, 2, "tp_rank"),
        (0, 0, "tp_size"),
        (0, -2, "tp_size"),
        (0, True, "tp_size"),
        (0, 2.0, "tp_size"),
        (0, 4, "tp_size"),  # neither divides the other: 6 heads
        (0, 9, "tp_size"),
    ],
)
def test_shard_refuses_what_cannot_be_cut(rank, ranks, argument):
    spec = small("cache_int8", num_kv_heads=6)
    bundle = static_scales(np.random.default_rng(0), "cache_int8", 6, 64)
    for cut in (spec.kv_heads, spec.shard, lambda *at: bundle.shard(spec, *at)):
        with pytest.raises(SpecError) as caught:
            cut(rank, ranks)
        assert caught.value.argument == argument


def sharded(batch, rank, ranks):
    """What one rank gets of a batch: its heads of qkv, its part of the cache and scales."""
    spec = batch.cache.spec
    own = spec.kv_heads(rank, ranks)
    q, k, v = batch.heads(np.float32)
    per_rank = batch.query_heads // ranks
    heads = (q[:, rank * per_rank : (rank + 1) * per_rank], k[:, list(own)], v[:, list(own)])
    static = batch.cache.static
    cache = LayerCache(
        spec.shard(rank, ranks),
        0,
        **dict(
            zip(
                TENSORS[batch.format],
                spec.shard(rank, ranks).allocate(len(batch.cache.k)),
                strict=True,
            )
        ),
        static=None if static is None else static.shard(spec, rank, ranks),
    )
    qkv = np.concatenate(heads, axis=1).reshape(len(q), -1)
    return np.ascontiguousarray(qkv), cache, own


def serve(qkv, cache, batch):
    q = ops.rope_write_kv(qkv, cache, **batch.meta, rope=batch.rope)
    return ops.paged_attention(q, cache, **batch.meta)


@pytest.mark.parametrize(("fmt", "granularity"), VARIANTS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_shards_together_are_the_whole(fmt, granularity, ranks):
    rng = np.random.default_rng(ranks)
    batch = make_batch(
        rng, fmt, granularity, cached=(0, 0), new=(9, 21), kv_heads=4, group=2, page_size=8
    )
    whole = serve(batch.qkv, batch.cache, batch)
    outs = []
    for rank in range(ranks):
        qkv, cache, own = sharded(batch, rank, ranks)
        outs.append(serve(qkv, cache, batch))
        for name in TENSORS[fmt]:
            part, all_heads = getattr(cache, name), getattr(batch.cache, name)
            for _, _, page, slot in batch.owned("new"):
                assert_same_bits(part[page, :, slot], all_heads[page, list(own), slot])
    # Each head is computed from the same bits; BLAS may sum another shape in another order.
    assert_close(np.concatenate(outs, axis=1), whole.astype(np.float64), fmt)


# Errors


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "page_size"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_sizes_must_be_positive_integers(name, value):
    with pytest.raises(SpecError) as caught:
        small(**({"layers": value} if name == "num_layers" else {name: value}))
    assert (caught.value.op, caught.value.argument) == ("CacheSpec", name)
    assert caught.value.got == repr(value)


@pytest.mark.parametrize("value", [0, -3, True, 1.5, None])
def test_page_and_token_counts_must_be_positive_integers(value):
    for call, argument in (
        (small().allocate, "num_pages"),
        (small().tensors, "num_pages"),
        (small().total_bytes, "num_pages"),
        (small().bytes_per_token, "tokens"),
    ):
        if argument == "tokens" and value is None:
            continue  # None counts the growing part alone
        with pytest.raises(SpecError) as caught:
            call(value)
        assert caught.value.argument == argument


@pytest.mark.parametrize("quant", ["cache_int4_zp", ("none", "cache_int4_zp")])
def test_packed_formats_need_an_even_head_dim(quant):
    layers = 1 if isinstance(quant, str) else 2
    with pytest.raises(SpecError) as caught:
        small(quant, layers, head_dim=63)
    assert caught.value.argument == "head_dim"
    assert caught.value.format == "cache_int4_zp"
    assert caught.value.expected == "a multiple of 2"
    assert small(head_dim=63).layer_tensors(0, 1)[0].shape == (1, 3, 16, 63)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("fp32", "float32"),
        ("torch.bfloat16", "bfloat16"),
        ("paddle.float16", "float16"),
        (np.float32, "float32"),
        (np.float16, "float16"),
        (np.dtype(np.float32), "float32"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (np.dtype(ml_dtypes.bfloat16), "bfloat16"),
    ],
)
def test_dtypes_by_other_names(alias, name):
    spec = small(dtype=alias, scale_dtype=alias)
    assert (spec.dtype, spec.scale_dtype) == (name, name)
    assert spec == small(dtype=name, scale_dtype=name)


@pytest.mark.parametrize("argument", ["dtype", "scale_dtype"])
@pytest.mark.parametrize(
    "value", ["float64", "int8", "float8_e4m3fn", "", None, np.int8, 3, "FP16"]
)
def test_other_dtypes_are_refused(argument, value):
    with pytest.raises(SpecError) as caught:
        small(**{argument: value})
    error = caught.value
    assert error.argument == argument
    assert error.expected == "one of bfloat16, float16, float32"
    assert error.got == repr(value)


@pytest.mark.parametrize("quant", ["int8", None, 7, ("none", "int8")])
def test_unknown_formats_are_refused(quant):
    layers = 2 if isinstance(quant, tuple) else 1
    with pytest.raises(UnknownNameError) as caught:
        small(quant, layers)
    assert (caught.value.op, caught.value.argument) == ("CacheSpec", "quant")
    assert caught.value.expected == f"one of {', '.join(FORMATS)}"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_formats_as_layers(count):
    with pytest.raises(SpecError, match="expected 2 formats, one a layer"):
        small(["cache_int8"] * count, 2)


@pytest.mark.parametrize("layer_id", [-1, 6, True, "0", None, 1.0])
def test_layer_ids_out_of_range(layer_id):
    spec = small(MIXED, 6)
    calls = (spec.layer_quant, spec.first_index, spec.storage_dtype)
    for call in (*calls, lambda i: spec.layer_tensors(i, 1)):
        with pytest.raises(LayerIndexError) as caught:
            call(layer_id)
        assert caught.value.expected == "0 to 5"
        assert isinstance(caught.value, IndexError)


@pytest.mark.parametrize(
    ("fmt", "granularity"),
    [("cache_fp8", "channel"), ("cache_int4_zp", "head"), ("cache_int8", "token")],
)
def test_granularities_that_a_format_lacks_are_refused(fmt, granularity):
    spec = small(fmt)
    for call in (
        spec.static_bytes,
        lambda g: spec.total_bytes(1, g),
        lambda g: spec.bytes_per_token(1, g),
    ):
        with pytest.raises(SpecError) as caught:
            call(granularity)
        error = caught.value
        assert isinstance(error, ContractError)
        assert (error.argument, error.format, error.got) == ("granularity", fmt, granularity)


def test_numpys_integers_are_integers():
    made = CacheSpec(np.int64(2), np.int32(4), np.int64(8), np.uint8(16), "block_wise_fp8")
    assert made == CacheSpec(2, 4, 8, 16, "block_wise_fp8")
    assert type(made.num_layers) is int
    assert made.first_index(np.int64(1)) == 4
    view = resolve(
        [object() for _ in range(8)],
        SimpleNamespace(layer_id=np.int64(1), cache_quant_type_str="block_wise_fp8"),
        made,
    )
    assert type(view.layer_id) is int
