# SPDX-License-Identifier: Apache-2.0
"""Sentinels: named by place, traced through slices, and closed to whoever wants values."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from fastkv import CacheSpec, QuantType, StaticScales
from fastkv.backends import resolve
from fastkv.errors import UnknownNameError
from fastkv.testing import (
    SCENARIOS,
    Scenario,
    SentinelError,
    SentinelTensor,
    sentinel_caches,
    sentinel_layer,
    sentinel_meta,
    sentinel_qkv,
)

FORMATS = [quant.value for quant in QuantType]
MIXED = CacheSpec(3, 2, 64, 8, ["cache_int8", "block_wise_fp8", "none"], dtype="float16")


def tensor(*shape):
    return SentinelTensor("cu_seqlens_q", shape, "int32")


# --- one tensor ---------------------------------------------------------------------------------


def test_a_sentinel_shows_its_name():
    assert repr(tensor(5)) == "<cu_seqlens_q>"
    assert tensor(5).root.part == (0, 5)
    assert (tensor(5, 3).shape, tensor(5, 3).ndim, len(tensor(5, 3))) == ((5, 3), 2, 5)


@pytest.mark.parametrize(
    ("key", "part", "shape", "text"),
    [
        (slice(0, 3), (0, 3), (3, 4), "[0:3]"),
        (slice(2, None), (2, 6), (4, 4), "[2:6]"),
        (slice(None, -1), (0, 5), (5, 4), "[0:5]"),
        (slice(4, 99), (4, 6), (2, 4), "[4:6]"),
        (slice(5, 2), (5, 5), (0, 4), "[5:5]"),
        ((slice(1, 3), slice(None)), (1, 3), (2, 4), "[1:3]"),
        ((slice(1, 3), ...), (1, 3), (2, 4), "[1:3]"),
    ],
)
def test_a_slice_of_rows_keeps_its_root_and_knows_its_part(key, part, shape, text):
    whole = tensor(6, 4)
    piece = whole[key]
    assert piece.root is whole
    assert (piece.part, piece.shape, piece.dtype) == (part, shape, "int32")
    assert repr(piece) == f"<cu_seqlens_q{text}>"
    assert not piece.is_whole()


def test_a_slice_of_a_slice_counts_from_the_root():
    whole = tensor(10)
    assert whole[2:9][1:3].part == (3, 5)
    assert whole[2:9][1:3].root is whole
    assert not whole[2:9][0:7].is_whole()


def test_a_slice_of_everything_is_whole():
    assert tensor(6)[:].is_whole()
    assert tensor(6)[0:4][:].is_whole() is False


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (0, "[0]"),
        ((slice(None), 0), "[:, 0]"),
        ((..., 1), "[..., 1]"),
        (slice(0, 6, 2), "[0:6:2]"),
        (None, "[None]"),
    ],
)
def test_other_keys_keep_the_root_and_lose_the_part(key, text):
    whole = tensor(6, 4)
    piece = whole[key]
    assert (piece.root, piece.part, piece.shape) == (whole, None, None)
    assert repr(piece) == f"<cu_seqlens_q{text}>"
    assert not piece.is_whole()


def test_another_layout_is_the_same_tensor():
    whole = tensor(6, 4)
    for moved in (whole.view(-1), whole.reshape(2, 12), whole[:].contiguous()):
        assert moved.root is whole
        assert moved.is_whole()
    part = whole[1:3].view(-1)
    assert (part.root, part.part, part.is_whole()) == (whole, (1, 3), False)
    with pytest.raises(SentinelError, match=r"shape of <cu_seqlens_q.view\(…\)> is not known"):
        whole.view(-1)[0:2]


def test_a_scalar_has_no_part():
    scalar = SentinelTensor("x", ())
    assert (scalar.part, scalar.is_whole()) == (None, True)


@pytest.mark.parametrize(
    "read",
    [
        bool,
        int,
        float,
        complex,
        list,
        np.asarray,
        range,
        abs,
        lambda x: 3 in x,
        lambda x: x < 3,
        lambda x: x + 1,
        lambda x: 1 / x,
        lambda x: x * x,
        lambda x: -x,
        lambda x: x.__setitem__(0, 1),
    ],
)
def test_reading_values_fails_with_the_name(read):
    with pytest.raises(SentinelError, match=r"<cu_seqlens_q> was asked for values"):
        read(tensor(5))


def test_no_attribute_can_be_set_or_deleted():
    whole = tensor(5)
    with pytest.raises(SentinelError, match="'scale' was set on <cu_seqlens_q>"):
        whole.scale = 1
    with pytest.raises(SentinelError, match="'name' was set"):
        whole.name = "other"
    with pytest.raises(SentinelError, match="'name' was deleted"):
        del whole.name
    assert whole.name == "cu_seqlens_q"


def test_an_unknown_attribute_is_absent():
    assert not hasattr(tensor(5), "data_ptr")
    with pytest.raises(
        AttributeError, match="<cu_seqlens_q> stands for a tensor and has no 'item'"
    ):
        tensor(5).item()


def test_equality_is_identity():
    one, other = tensor(5), tensor(5)
    assert one != other
    assert len({one, other, one}) == 2


def test_the_error_counts_as_a_failed_assertion():
    assert issubclass(SentinelError, AssertionError)


# --- caches and layers --------------------------------------------------------------------------


def test_the_flat_list_is_named_by_index_layer_and_role():
    caches = sentinel_caches(MIXED, num_pages=7)
    assert [cache.name for cache in caches] == [
        "caches[0] = layer 0's k",
        "caches[1] = layer 0's v",
        "caches[2] = layer 1's k",
        "caches[3] = layer 1's v",
        "caches[4] = layer 1's k_scale",
        "caches[5] = layer 1's v_scale",
        "caches[6] = layer 2's k",
        "caches[7] = layer 2's v",
    ]
    want = [(one.shape, one.dtype) for one in MIXED.tensors(7)]
    assert [(cache.shape, cache.dtype) for cache in caches] == want


@pytest.mark.parametrize("scales", ["attributes", "bundle"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_resolve_takes_sentinel_layers(fmt, scales):
    spec = CacheSpec(3, 2, 64, 8, fmt)
    caches, layer = sentinel_caches(spec), sentinel_layer(spec, 2, scales)
    view = resolve(caches, layer, spec)
    assert view.k is caches[2 * len(caches) // 3]
    names = (
        {}
        if view.static is None
        else {field: getattr(view.static, field).name for field in view.quant.static_fields}
    )
    in_bundle = {field: f"layer 2's static_scales.{field}" for field in names}
    on_layer = {
        "k_quant": "layer 2's cache_k_scale",
        "k_dequant": "layer 2's cache_k_out_scale",
        "v_quant": "layer 2's cache_v_scale",
        "v_dequant": "layer 2's cache_v_out_scale",
        "k_zp": "layer 2's cache_k_zp",
        "v_zp": "layer 2's cache_v_zp",
    }
    wanted = in_bundle if scales == "bundle" else {name: on_layer[name] for name in names}
    assert names == wanted
    assert bool(names) == (fmt in ("cache_int8", "cache_fp8", "cache_int4_zp"))
    assert ("k_zp" in names) == (fmt == "cache_int4_zp")


def test_static_scales_have_the_shape_of_the_formats_preferred_granularity():
    per_head, per_channel = (
        sentinel_layer(CacheSpec(1, 2, 64, 8, fmt), 0).cache_v_scale
        for fmt in ("cache_fp8", "cache_int4_zp")
    )
    assert (per_head.shape, per_channel.shape) == ((2,), (2, 64))
    assert per_head.dtype == "float32"


def test_a_dynamic_layer_has_attributes_that_nobody_fills():
    spec = CacheSpec(1, 2, 64, 8, "block_wise_fp8")
    layer = sentinel_layer(spec, 0)
    assert repr(layer.cache_v_out_scale) == "<layer 0's cache_v_out_scale, never filled>"
    assert not hasattr(layer, "cache_k_zp")
    bundled = sentinel_layer(spec, 0, "bundle")
    assert vars(bundled) == {"layer_id": 0, "cache_quant_type_str": "block_wise_fp8"}


def test_a_bundle_is_a_bundle():
    layer = sentinel_layer(MIXED, 0, "bundle")
    assert isinstance(layer.static_scales, StaticScales)
    assert not hasattr(layer, "cache_k_scale")


def test_attributes_of_the_caller_win():
    layer = sentinel_layer(MIXED, 1, cache_k_scale=None, sliding_window=9)
    assert (layer.cache_k_scale, layer.sliding_window, layer.layer_id) == (None, 9, 1)
    assert isinstance(layer, SimpleNamespace)


def test_a_misspelt_way_to_carry_scales():
    with pytest.raises(UnknownNameError, match="one of attributes, bundle, got 'bundel'"):
        sentinel_layer(MIXED, 0, "bundel")


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_batch_has_the_shapes_of_its_scenario(name):
    step = SCENARIOS[name]
    caches = sentinel_caches(MIXED)
    meta = sentinel_meta(MIXED, caches, name)
    requests = len(step.cached)
    assert meta.caches is caches
    assert (meta.num_requests, meta.num_decode) == (requests, step.num_decode)
    assert meta.cu_seqlens_q.shape == meta.cu_seqlens_k.shape == (requests + 1,)
    lengths = [a + b for a, b in zip(step.new_tokens, step.cached, strict=True)]
    assert meta.block_table.shape == (requests, -(-max(lengths) // 8))
    assert meta.total_k == sum(lengths[step.num_decode :])
    assert sentinel_qkv(MIXED, step).shape == (sum(step.new_tokens), (3 + 2) * 2 * 64)
    assert sentinel_qkv(MIXED, step, group=1).shape[1] == 3 * 2 * 64
    assert sentinel_qkv(MIXED, step).dtype == "float16"


def test_the_four_scenarios():
    found = {
        name: (
            step.num_decode > 0,
            step.num_decode < step.num_requests,
            any(step.cached[step.num_decode :]),
        )
        for name, step in SCENARIOS.items()
    }
    assert found == {
        "decode only": (True, False, False),
        "prefill": (False, True, False),
        "prefill over a prefix": (False, True, True),
        "mixed": (True, True, True),
    }
    # A mixture has prefill without a prefix as well, and several draft tokens.
    mixed = SCENARIOS["mixed"]
    assert 0 in mixed.cached[mixed.num_decode :]
    assert max(mixed.new_tokens[: mixed.num_decode]) > 1


def test_a_scenario_of_ones_own_and_changes():
    step = Scenario("none at all", (), (), 0)
    meta = sentinel_meta(MIXED, [], step, rope=None)
    assert (meta.num_requests, meta.total_k, meta.rope) == (0, 0, None)
    assert str(step) == "none at all"


@pytest.mark.parametrize(
    "make", [lambda name: sentinel_meta(MIXED, [], name), lambda name: sentinel_qkv(MIXED, name)]
)
def test_a_misspelt_scenario(make):
    with pytest.raises(UnknownNameError, match="Did you mean 'prefill'"):
        make("prefil")


def test_sentinels_are_not_copied_behind_ones_back():
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(SentinelError, match="<cu_seqlens_q> was copied"):
            duplicate(tensor(5))
