# SPDX-License-Identifier: Apache-2.0
"""From an engine's flat list to one layer's tensors, by index and attribute alone."""

import re
from types import SimpleNamespace

import pytest

from fastkv import CacheSpec, QuantType, StaticScales
from fastkv.backends import resolve
from fastkv.errors import (
    ContractError,
    DtypeError,
    LayerIndexError,
    MissingTensorError,
    SpecMismatchError,
    SurplusTensorError,
    UnknownNameError,
)
from helpers.sentinels import (
    FORMATS,
    SCALES,
    STATIC,
    TENSORS,
    ZERO_POINTS,
    Sentinel,
    bare_layer,
    first_index,
    flat_list,
)

MIXED = ("none", "block_wise_fp8", "cache_int4_zp", "block_wise_fp8", "cache_fp8", "cache_int8")
STATIC_FORMATS = [fmt for fmt in FORMATS if STATIC[fmt]]
NO_STATIC = [fmt for fmt in FORMATS if not STATIC[fmt]]
NO_ZERO_POINTS = [fmt for fmt in FORMATS if "cache_k_zp" not in STATIC[fmt]]


def spec_of(fmt, layers=3):
    return CacheSpec(layers, 2, 16, 4, fmt)


def bundle(fmt):
    return StaticScales(**{field: Sentinel(field) for field in STATIC[fmt].values()})


def assert_names(error, argument, fmt, got):
    """The five facts, as attributes and in the text."""
    assert error.op == "resolve"
    assert error.argument == argument
    assert error.format == fmt
    assert error.got == got
    assert error.expected
    for part in ("resolve", argument, f"format {fmt}", error.expected, got):
        assert part in str(error)


def assert_is_layer(view, caches, formats, layer, layer_id):
    fmt, first = formats[layer_id], first_index(formats, layer_id)
    for i, name in enumerate(TENSORS[fmt]):
        assert getattr(view, name) is caches[first + i]
    if len(TENSORS[fmt]) == 2:
        assert (view.k_scale, view.v_scale) == (None, None)
    assert view.layer_id == layer_id
    assert view.quant.name.value == fmt
    if not STATIC[fmt]:
        assert view.static is None
        return
    for attribute, name in STATIC[fmt].items():
        assert getattr(view.static, name) is getattr(layer, attribute)
    for name in {"k_zp", "v_zp"} - set(STATIC[fmt].values()):
        assert getattr(view.static, name) is None


def test_tables_of_these_tests_cover_every_format():
    assert set(FORMATS) == set(STATIC) == {quant.value for quant in QuantType}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("layer_id", [0, 1, 4])
def test_uniform_list(fmt, layer_id):
    spec = spec_of(fmt, 5)
    caches, layer = flat_list(spec), bare_layer(fmt, layer_id)
    assert len(caches) == 5 * len(TENSORS[fmt])
    assert_is_layer(resolve(caches, layer, spec), caches, [fmt] * 5, layer, layer_id)


@pytest.mark.parametrize("layer_id", range(len(MIXED)))
def test_mixed_list_counts_the_tensors_before(layer_id):
    spec = spec_of(MIXED, len(MIXED))
    caches, layer = flat_list(spec), bare_layer(MIXED[layer_id], layer_id)
    assert_is_layer(resolve(caches, layer, spec), caches, MIXED, layer, layer_id)


def test_second_layer_of_a_dynamic_format_by_hand():
    caches = [object() for _ in range(8)]
    layer = SimpleNamespace(layer_id=1, cache_quant_type_str="block_wise_fp8")
    view = resolve(caches, layer, spec_of("block_wise_fp8", 2))
    assert view.k is caches[4]
    assert view.v is caches[5]
    assert view.k_scale is caches[6]
    assert view.v_scale is caches[7]


@pytest.mark.parametrize("fmt", STATIC_FORMATS)
def test_bundle_on_the_layer_is_taken_as_it_is(fmt):
    layer = SimpleNamespace(layer_id=0, cache_quant_type_str=fmt, static_scales=bundle(fmt))
    spec = spec_of(fmt)
    assert resolve(flat_list(spec), layer, spec).static is layer.static_scales


def test_a_tuple_is_a_list():
    spec = spec_of("none")
    caches = tuple(flat_list(spec))
    assert resolve(caches, bare_layer("none", 2), spec).v is caches[5]


def test_the_view_is_frozen():
    spec = spec_of("none")
    view = resolve(flat_list(spec), bare_layer("none"), spec)
    with pytest.raises(AttributeError):
        view.k = object()


# --- missing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "name"), [(f, n) for f in FORMATS for n in TENSORS[f]])
def test_each_cache_tensor_is_required_on_its_own(fmt, name):
    spec = spec_of([fmt, "block_wise_fp8", fmt])
    caches = flat_list(spec)
    at = first_index([fmt, "block_wise_fp8"], 2) + TENSORS[fmt].index(name)
    caches[at] = None
    with pytest.raises(MissingTensorError) as caught:
        resolve(caches, bare_layer(fmt, 2), spec)
    assert_names(caught.value, f"caches[{at}], layer 2's {name}", fmt, "None")


@pytest.mark.parametrize("how", ["none", "absent"])
@pytest.mark.parametrize(("fmt", "name"), [(f, n) for f in FORMATS for n in STATIC[f]])
def test_each_static_tensor_is_required_on_its_own(fmt, name, how):
    layer, spec = bare_layer(fmt), spec_of(fmt)
    if how == "none":
        setattr(layer, name, None)
    else:
        delattr(layer, name)
    with pytest.raises(MissingTensorError) as caught:
        resolve(flat_list(spec), layer, spec)
    assert_names(caught.value, f"layer.{name}", fmt, "None")


@pytest.mark.parametrize("name", ["k_zp", "v_zp"])
def test_bundle_needs_each_zero_point_on_its_own(name):
    scales = bundle("cache_int4_zp")
    object.__setattr__(scales, name, None)  # its constructor refuses half a pair
    layer = SimpleNamespace(layer_id=0, cache_quant_type_str="cache_int4_zp", static_scales=scales)
    with pytest.raises(MissingTensorError) as caught:
        resolve(flat_list(spec_of("cache_int4_zp")), layer, spec_of("cache_int4_zp"))
    assert_names(caught.value, f"layer.static_scales.{name}", "cache_int4_zp", "None")


# --- surplus ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZERO_POINTS)
@pytest.mark.parametrize("fmt", NO_ZERO_POINTS)
def test_zero_point_on_a_format_without_one(fmt, name):
    layer, spec = bare_layer(fmt, **{name: object()}), spec_of(fmt)
    with pytest.raises(SurplusTensorError, match="no zero points") as caught:
        resolve(flat_list(spec), layer, spec)
    assert_names(caught.value, f"layer.{name}", fmt, "object")


@pytest.mark.parametrize("fmt", [fmt for fmt in STATIC_FORMATS if fmt in NO_ZERO_POINTS])
def test_zero_points_in_the_bundle_of_a_format_without_them(fmt):
    layer = SimpleNamespace(
        layer_id=0, cache_quant_type_str=fmt, static_scales=bundle("cache_int4_zp")
    )
    with pytest.raises(SurplusTensorError) as caught:
        resolve(flat_list(spec_of(fmt)), layer, spec_of(fmt))
    assert_names(caught.value, "layer.static_scales.k_zp", fmt, "Sentinel")


@pytest.mark.parametrize("fmt", NO_STATIC)
@pytest.mark.parametrize("given", [bundle("cache_int8"), object()], ids=["bundle", "other"])
def test_bundle_on_a_format_that_takes_none(fmt, given):
    layer, spec = bare_layer(fmt, static_scales=given), spec_of(fmt)
    with pytest.raises(SurplusTensorError) as caught:
        resolve(flat_list(spec), layer, spec)
    assert_names(caught.value, "layer.static_scales", fmt, type(given).__name__)


@pytest.mark.parametrize("name", SCALES)
def test_scale_on_a_cache_without_scales(name):
    layer, spec = bare_layer("none", **{name: object()}), spec_of("none")
    with pytest.raises(SurplusTensorError, match="has no scales") as caught:
        resolve(flat_list(spec), layer, spec)
    assert_names(caught.value, f"layer.{name}", "none", "object")


@pytest.mark.parametrize("name", [*SCALES, *ZERO_POINTS])
def test_bundle_and_attributes_together(name):
    layer = SimpleNamespace(
        layer_id=0,
        cache_quant_type_str="cache_int4_zp",
        static_scales=bundle("cache_int4_zp"),
        **{name: object()},
    )
    with pytest.raises(SurplusTensorError, match="which one would count") as caught:
        resolve(flat_list(spec_of("cache_int4_zp")), layer, spec_of("cache_int4_zp"))
    assert_names(caught.value, f"layer.{name}", "cache_int4_zp", "object")


@pytest.mark.parametrize("fmt", STATIC_FORMATS)
def test_bundle_of_another_type(fmt):
    layer = SimpleNamespace(layer_id=0, cache_quant_type_str=fmt, static_scales={"k_quant": 1.0})
    with pytest.raises(DtypeError) as caught:
        resolve(flat_list(spec_of(fmt)), layer, spec_of(fmt))
    assert_names(caught.value, "layer.static_scales", fmt, "dict")


class Unfilled:
    """The layer of a dynamic format: scale attributes that exist and must not be read."""

    def __init__(self):
        self.layer_id, self.cache_quant_type_str = 1, "block_wise_fp8"
        self.read = []

    def __getattr__(self, name):
        self.read.append(name)
        if name in SCALES:
            raise RuntimeError(f"{name} was read")
        raise AttributeError(name)


def test_static_scales_on_a_dynamic_layer_are_legal_and_not_read():
    spec, layer = spec_of("block_wise_fp8"), Unfilled()
    with pytest.raises(RuntimeError, match="cache_k_scale was read"):
        _ = layer.cache_k_scale
    layer.read.clear()
    view = resolve(flat_list(spec), layer, spec)
    assert view.static is None
    assert not set(layer.read) & set(SCALES)


# --- what does not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("off", [-1, 1])
def test_list_of_another_length(fmt, off):
    spec = spec_of(fmt)
    length = spec.num_tensors + off
    with pytest.raises(SpecMismatchError) as caught:
        resolve([object() for _ in range(length)], bare_layer(fmt), spec)
    assert_names(caught.value, "caches", fmt, f"{length} tensors")
    assert f"{3 * len(TENSORS[fmt])} tensors for 3 layers" in str(caught.value)


@pytest.mark.parametrize(
    "caches", [None, Sentinel("a stacked tensor"), dict.fromkeys(range(6))], ids=repr
)
def test_caches_that_are_no_list(caches):
    with pytest.raises(SpecMismatchError) as caught:
        resolve(caches, bare_layer("none"), spec_of("none"))
    assert_names(caught.value, "caches", "none", type(caches).__name__)


def test_list_of_a_two_tensor_format_for_a_dynamic_layer():
    # The bug that fastkv ends: 2 tensors a layer where the layer's format keeps 4.
    with pytest.raises(SpecMismatchError, match="8 tensors for 2 layers"):
        resolve([object()] * 4, bare_layer("block_wise_fp8"), spec_of("block_wise_fp8", 2))


@pytest.mark.parametrize("layer_id", [3, -1, 10**9, True, False, "1", 1.0, None, Sentinel("id")])
def test_layer_id_out_of_range_or_no_integer(layer_id):
    spec = spec_of("none")
    with pytest.raises(LayerIndexError) as caught:
        resolve(flat_list(spec), bare_layer("none", layer_id), spec)
    assert isinstance(caught.value, IndexError)
    assert (caught.value.op, caught.value.argument) == ("resolve", "layer.layer_id")
    assert caught.value.got == repr(layer_id)
    assert "expected an integer, 0 to 2, got" in str(caught.value)


@pytest.mark.parametrize("layer", [SimpleNamespace(), None], ids=repr)
def test_layer_without_an_id(layer):
    spec = spec_of("none")
    with pytest.raises(LayerIndexError, match="no such attribute"):
        resolve(flat_list(spec), layer, spec)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("cache_int4", "cache_int4_zp"),
        ("int4", "cache_int4_zp"),
        ("int8", "cache_int8"),
        ("FP8", "cache_fp8"),
        ("Cache_Int8", "cache_int8"),
        ("block_wise_fp4", "block_wise_fp8"),
        ("blockwise_fp8", "block_wise_fp8"),
        ("None", "none"),
        ("qwertz", None),
        ("", None),
        (5, None),
    ],
)
def test_unknown_format_lists_exactly_the_table(name, suggestion):
    spec = spec_of("cache_int8")
    with pytest.raises(UnknownNameError) as caught:
        resolve(flat_list(spec), bare_layer("cache_int8", cache_quant_type_str=name), spec)
    text = str(caught.value)
    assert caught.value.op == "resolve"
    assert caught.value.argument == "layer.cache_quant_type_str"
    assert caught.value.got == repr(name)
    listed = re.search(r"expected one of (.*), got", text).group(1).split(", ")
    assert listed == ["none", "cache_int8", "cache_fp8", "cache_int4_zp", "block_wise_fp8"]
    assert listed == [quant.value for quant in QuantType]
    assert re.findall(r"Did you mean '(.*)'\?", text) == ([suggestion] if suggestion else [])


@pytest.mark.parametrize("given", FORMATS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_layer_of_another_format_than_the_spec(fmt, given):
    spec = spec_of(fmt)
    caches, layer = flat_list(spec), bare_layer(fmt, cache_quant_type_str=given)
    if given == fmt:
        assert resolve(caches, layer, spec).k is caches[0]
        return
    with pytest.raises(SpecMismatchError) as caught:
        resolve(caches, layer, spec)
    assert_names(caught.value, "layer.cache_quant_type_str", fmt, given)


def test_the_format_is_compared_with_the_layers_own_row():
    spec = spec_of(["cache_int8", "none"], 2)
    with pytest.raises(SpecMismatchError):
        resolve(flat_list(spec), bare_layer("cache_int8", 1), spec)


@pytest.mark.parametrize("given", [{}, {"cache_quant_type_str": None}], ids=["absent", "None"])
def test_no_format_means_none(given):
    layer, spec = SimpleNamespace(layer_id=0, **given), spec_of("none")
    caches = flat_list(spec)
    assert resolve(caches, layer, spec).k is caches[0]
    for fmt in set(FORMATS) - {"none"}:
        layer = bare_layer(fmt)
        del layer.cache_quant_type_str
        vars(layer).update(given)
        with pytest.raises(SpecMismatchError) as caught:
            resolve(flat_list(spec_of(fmt)), layer, spec_of(fmt))
        assert_names(caught.value, "layer.cache_quant_type_str", fmt, "no name, which means none")


def test_the_format_may_be_a_member_of_the_enumeration():
    spec = spec_of("cache_int8")
    layer = bare_layer("cache_int8", cache_quant_type_str=QuantType.CACHE_INT8)
    assert resolve(flat_list(spec), layer, spec).quant.name is QuantType.CACHE_INT8


def test_nothing_is_looked_into():
    # Sentinels fail the test when they are read, compared by value or asked for their truth.
    for fmt in FORMATS:
        spec = spec_of(fmt)
        caches = [Sentinel(f"caches[{i}]") for i in range(spec.num_tensors)]
        assert resolve(caches, bare_layer(fmt, 2), spec).v is caches[2 * len(TENSORS[fmt]) + 1]


def test_every_error_is_a_contract_error_and_a_value_error():
    for error in (
        DtypeError,
        LayerIndexError,
        MissingTensorError,
        SpecMismatchError,
        SurplusTensorError,
        UnknownNameError,
    ):
        assert issubclass(error, ContractError)
        assert issubclass(error, ValueError)
