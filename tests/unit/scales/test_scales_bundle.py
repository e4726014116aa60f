# SPDX-License-Identifier: Apache-2.0
"""`StaticScales`: moved unread, read once by `validate`."""

from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from fastkv import CacheSpec, StaticScales
from fastkv.arrays import numpy_dtype
from fastkv.errors import (
    DtypeError,
    LayerIndexError,
    MissingTensorError,
    PlacementError,
    ScaleError,
    ShapeError,
    SurplusTensorError,
)
from fastkv.scales import FIELDS
from helpers.batches import VARIANTS, static_scales
from helpers.compare import assert_same_bits
from helpers.sentinels import Sentinel

HEADS, DIM = 3, 8
STATIC_VARIANTS = [variant for variant in VARIANTS if variant[1] is not None]
#: One granularity of each static format, with the fields it has.
FORMAT_FIELDS = [
    (fmt, granularity, name)
    for fmt, granularity in (
        ("cache_int8", "channel"),
        ("cache_fp8", "head"),
        ("cache_int4_zp", "channel"),
    )
    for name in (FIELDS if fmt == "cache_int4_zp" else FIELDS[:4])
]


def spec(fmt="cache_int8", **changes):
    return CacheSpec(
        **({"num_layers": 1, "num_kv_heads": HEADS, "head_dim": DIM} | changes),
        page_size=4,
        quant=fmt,
    )


def bundle(fmt="cache_int8", granularity=None, dtype="float32", seed=0):
    return static_scales(np.random.default_rng(seed), fmt, HEADS, DIM, granularity, dtype)


def arrays_of(scales):
    return {name: getattr(scales, name) for name in FIELDS if getattr(scales, name) is not None}


def changed(scales, name, change):
    """The bundle with a changed copy of one array."""
    array = getattr(scales, name).copy()
    return replace(scales, **{name: change(array)})


# Building


def test_building_reads_no_values():
    sentinels = {name: Sentinel(name) for name in FIELDS}
    scales = StaticScales(**sentinels)
    assert all(getattr(scales, name) is sentinel for name, sentinel in sentinels.items())
    without = StaticScales(**{name: sentinels[name] for name in FIELDS[:4]})
    assert without.k_zp is None
    assert without.v_zp is None


def test_fields_stand_in_the_public_order():
    assert FIELDS == ("k_quant", "k_dequant", "v_quant", "v_dequant", "k_zp", "v_zp")
    assert tuple(field.name for field in fields(StaticScales)) == FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_bundle_is_frozen(name):
    with pytest.raises(FrozenInstanceError):
        setattr(bundle("cache_int4_zp"), name, None)


@pytest.mark.parametrize("name", FIELDS)
def test_each_absent_field_raises_on_its_own(name):
    sentinels = {other: Sentinel(other) for other in FIELDS}
    with pytest.raises(MissingTensorError) as caught:
        StaticScales(**(sentinels | {name: None}))
    assert (caught.value.op, caught.value.argument) == ("StaticScales", name)


def test_map_changes_what_is_there():
    scales = bundle()
    doubled = scales.map(lambda array: 2 * array)
    for name, array in arrays_of(scales).items():
        np.testing.assert_array_equal(getattr(doubled, name), 2 * array)
    assert doubled.k_zp is None
    assert doubled.v_zp is None


def test_to_copies():
    scales = bundle("cache_int4_zp", dtype="bfloat16")
    copy = scales.to("numpy")
    for name, array in arrays_of(scales).items():
        assert_same_bits(getattr(copy, name), array)
        assert not np.shares_memory(getattr(copy, name), array)


# Sharding


@pytest.mark.parametrize(("fmt", "granularity"), STATIC_VARIANTS)
@pytest.mark.parametrize("ranks", [1, 3, 9])
def test_shard_cuts_along_the_heads_of_the_cache(fmt, granularity, ranks):
    scales = bundle(fmt, granularity)
    whole = spec(fmt)
    for rank in range(ranks):
        own = list(whole.kv_heads(rank, ranks))
        part = scales.shard(whole, rank, ranks)
        part.validate(whole.shard(rank, ranks))
        for name, array in arrays_of(scales).items():
            heads = array.reshape(HEADS, -1)[own]
            assert_same_bits(getattr(part, name), heads.reshape(-1) if array.ndim == 1 else heads)


@pytest.mark.parametrize("shape", [(1,), (2,), (HEADS + 1, DIM), (DIM, HEADS), (2 * HEADS * DIM,)])
def test_shard_refuses_what_is_not_the_whole(shape):
    scales = bundle().map(lambda _: np.ones(shape, np.float32))
    with pytest.raises(ShapeError) as caught:
        scales.shard(spec(), 0, 3)
    assert caught.value.got == str(list(shape))


# Validation: what is fine


@pytest.mark.parametrize(("fmt", "granularity"), STATIC_VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_valid_bundle_gets_no_remark(fmt, granularity, dtype):
    assert bundle(fmt, granularity, dtype).validate(spec(fmt)) == ()


def test_zero_points_may_be_zero_negative_and_outside_the_codes():
    scales = bundle("cache_int4_zp")
    values = np.resize(np.array([0, -0.0, -8, 7.5, -1000, 300], np.float32), (HEADS, DIM))
    assert replace(scales, k_zp=values, v_zp=-values).validate(spec("cache_int4_zp")) == ()


def test_layer_names_the_format():
    mixed = spec(("cache_int8", "cache_int4_zp"), num_layers=2)
    assert bundle("cache_int8").validate(mixed, 0) == ()
    assert bundle("cache_int4_zp").validate(mixed, 1) == ()
    with pytest.raises(MissingTensorError) as caught:
        bundle("cache_int8", "channel").validate(mixed, 1)
    assert caught.value.op == "StaticScales.validate(layer_id=1)"
    with pytest.raises(LayerIndexError):
        bundle().validate(mixed, 2)


# Validation: presence


@pytest.mark.parametrize("fmt", ["none", "block_wise_fp8"])
def test_formats_without_static_scales_refuse_a_bundle(fmt):
    sentinels = StaticScales(*map(Sentinel, FIELDS[:4]))
    with pytest.raises(SurplusTensorError) as caught:
        sentinels.validate(spec(fmt))
    assert (caught.value.argument, caught.value.format) == ("static", fmt)


def test_zero_points_are_required():
    scales = bundle("cache_int8", "channel")
    with pytest.raises(MissingTensorError) as caught:
        scales.validate(spec("cache_int4_zp"))
    assert (caught.value.argument, caught.value.format) == ("static.k_zp", "cache_int4_zp")


@pytest.mark.parametrize("fmt", ["cache_int8", "cache_fp8"])
def test_zero_points_are_refused_elsewhere(fmt):
    scales = replace(bundle(fmt), k_zp=Sentinel("k_zp"), v_zp=Sentinel("v_zp"))
    with pytest.raises(SurplusTensorError) as caught:
        scales.validate(spec(fmt))
    assert (caught.value.argument, caught.value.format) == ("static.k_zp", fmt)


# Validation: metadata


@pytest.mark.parametrize(("fmt", "granularity", "name"), FORMAT_FIELDS)
@pytest.mark.parametrize(
    "shape",
    [
        (),
        (1,),
        (HEADS + 1,),
        (DIM,),
        (HEADS, DIM + 1),
        (DIM, HEADS),
        (HEADS, DIM, 1),
        (1, HEADS),
        (0,),
    ],
    ids=str,
)
def test_other_shapes_are_refused(fmt, granularity, name, shape):
    scales = replace(bundle(fmt, granularity), **{name: np.ones(shape, np.float32)})
    with pytest.raises(ShapeError) as caught:
        scales.validate(spec(fmt))
    error = caught.value
    assert (error.argument, error.format) == (f"static.{name}", fmt)
    assert error.got == str(list(shape))


@pytest.mark.parametrize(
    ("fmt", "shape"),
    [("cache_fp8", (HEADS, DIM)), ("cache_fp8", (HEADS * DIM,)), ("cache_int4_zp", (HEADS,))],
)
def test_granularities_that_a_format_lacks_are_refused(fmt, shape):
    scales = bundle(fmt).map(lambda _: np.ones(shape, np.float32))
    with pytest.raises(ShapeError) as caught:
        scales.validate(spec(fmt))
    assert (caught.value.argument, caught.value.format) == ("static.k_quant", fmt)


@pytest.mark.parametrize(("fmt", "granularity", "name"), FORMAT_FIELDS)
@pytest.mark.parametrize("dtype", ["float64", "int32", "uint16", ">f4", "float8_e4m3fn"])
def test_other_dtypes_are_refused(fmt, granularity, name, dtype):
    scales = changed(bundle(fmt, granularity), name, lambda a: np.ones(a.shape, numpy_dtype(dtype)))
    with pytest.raises(DtypeError) as caught:
        scales.validate(spec(fmt))
    error = caught.value
    assert (error.argument, error.format, error.got) == (f"static.{name}", fmt, dtype)


@pytest.mark.parametrize("value", [1.0, [1.0, 2.0, 3.0], "scale", Sentinel("s")], ids=repr)
def test_what_is_no_tensor_is_refused(value):
    with pytest.raises(DtypeError) as caught:
        replace(bundle(), v_quant=value).validate(spec())
    assert caught.value.argument == "static.v_quant"
    assert caught.value.got == f"{type(value).__module__}.{type(value).__qualname__}"


# Validation: values


@pytest.mark.parametrize(("fmt", "granularity", "name"), FORMAT_FIELDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -0.0, -0.5])
def test_one_bad_value_anywhere_is_refused(fmt, granularity, name, value):
    rng = np.random.default_rng(FIELDS.index(name))
    scales = bundle(fmt, granularity)
    at = tuple(int(rng.integers(size)) for size in getattr(scales, name).shape)

    def put(array):
        array[at] = value
        return array

    scales = changed(scales, name, put)
    is_zero_point = name.endswith("_zp")
    if is_zero_point and np.isfinite(value):
        assert scales.validate(spec(fmt)) == ()
        return
    with pytest.raises(ScaleError) as caught:
        scales.validate(spec(fmt))
    error = caught.value
    assert (error.argument, error.format) == (f"static.{name}{list(at)}", fmt)
    assert error.expected == ("finite" if is_zero_point else "finite and > 0")
    assert error.got == str(np.float32(value))
    assert ("created and never filled" in error.hint) == (value == 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bad_values_are_found_in_every_dtype(dtype):
    scales = bundle(dtype=dtype)
    scales.v_dequant[1] = np.inf
    with pytest.raises(ScaleError, match=r"static.v_dequant\[1\]"):
        scales.validate(spec())


# Validation: remarks


@pytest.mark.parametrize(("fmt", "granularity"), STATIC_VARIANTS)
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize(
    ("product", "remarked"), [(1.021, True), (0.979, True), (1.019, False), (0.981, False)]
)
def test_pair_that_is_not_inverse_is_remarked_on(fmt, granularity, side, product, remarked):
    scales = bundle(fmt, granularity)
    scales = replace(scales, k_dequant=1 / scales.k_quant, v_dequant=1 / scales.v_quant)
    dequant = getattr(scales, f"{side}_dequant").copy()
    dequant.reshape(-1)[2] *= np.float32(product)
    found = replace(scales, **{f"{side}_dequant": dequant}).validate(spec(fmt))
    if not remarked:
        assert found == ()
        return
    (remark,) = found
    assert remark.startswith(f"{side}_quant x {side}_dequant is {product:.4g} at 2")
    assert "not inverse within 2 %" in remark


def test_quant_handed_over_as_dequant_is_remarked_on_both_sides():
    scales = bundle()
    swapped = StaticScales(scales.k_dequant, scales.k_dequant, scales.v_quant, scales.v_quant)
    assert [remark[:7] for remark in swapped.validate(spec())] == ["k_quant", "v_quant"]


@pytest.mark.parametrize(("fmt", "granularity"), STATIC_VARIANTS)
def test_multipliers_that_are_all_one_are_remarked_on(fmt, granularity):
    ones = bundle(fmt, granularity)
    ones = replace(ones, **{name: np.ones_like(getattr(ones, name)) for name in FIELDS[:4]})
    (remark,) = ones.validate(spec(fmt))
    assert "every multiplier is 1.0" in remark
    v = np.full_like(ones.v_quant, 2)
    assert replace(ones, v_quant=v, v_dequant=1 / v).validate(spec(fmt)) == ()


def test_granularities_that_differ_within_a_pair_are_remarked_on():
    heads, channels = bundle(granularity="head"), bundle(granularity="channel")
    found = replace(heads, v_dequant=channels.v_dequant).validate(spec())
    assert found == ("v_quant and v_dequant have different granularities",)


def test_flat_and_square_channels_are_the_same_granularity():
    square, flat = bundle(granularity="channel"), bundle(granularity="flat")
    assert replace(square, k_dequant=flat.k_dequant).validate(spec()) == ()


def test_to_refuses_a_device_that_a_library_lacks():
    with pytest.raises(PlacementError, match="expected cpu for numpy, got cuda:0"):
        bundle().to("numpy", "cuda:0")
