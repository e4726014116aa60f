# SPDX-License-Identifier: Apache-2.0
"""Faults that metadata shows: the right exception, before the implementation is called."""

import importlib
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fastkv import Rope, StaticScales, arrays
from fastkv.contracts import calls
from fastkv.errors import (
    ContractError,
    DtypeError,
    LayerIndexError,
    MissingTensorError,
    PlacementError,
    ReadOnlyError,
    ShapeError,
    SurplusTensorError,
    UnsupportedError,
)
from fastkv.ops import dispatch
from helpers.batches import FORMATS, floats
from helpers.calls import OPS, REQUIRED, WITH_CACHE, legal_call

STATIC = ("k_quant", "k_dequant", "v_quant", "v_dequant")


@pytest.fixture
def fresh_dispatch():
    """Dispatch looks an implementation up once a process; here before and after the test."""
    dispatch._function.cache_clear()
    yield
    dispatch._function.cache_clear()


@pytest.fixture
def implementations(mocker, fresh_dispatch):
    """Spies on what runs the ops, all under one mock."""
    every = mocker.Mock()
    for op in OPS:
        spy = mocker.spy(importlib.import_module(f"fastkv.ops.reference.{op}"), op)
        every.attach_mock(spy, op)
    dispatch._function.cache_clear()  # it remembers the functions, and would then the spies
    yield every
    dispatch._function.cache_clear()


def fault(call, exception, argument, implementations):
    """The error of a broken call: one class exactly, attributes, text; nothing ran."""
    error = call.raises(ContractError)
    assert type(error) is exception
    assert error.op == call.op
    assert error.argument == argument
    cache = call.arguments.get("cache")
    assert error.format == (cache.quant.name.value if cache is not None else None)
    for part in (error.op, error.argument, error.expected, error.got):
        assert part
        assert part in str(error)
    assert implementations.mock_calls == []
    return error


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("op", OPS)
def test_the_legal_call_runs(op, fmt, implementations):
    legal_call(op, fmt).run()
    assert [name for name, _, _ in implementations.mock_calls] == [op]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("op", ["rope_write_kv", "paged_attention", "masked_attention"])
def test_without_rows_nothing_runs(op, fmt, implementations):
    call = legal_call(op, fmt, cached=(3, 0), new=(0, 0), padding=0)
    result = call.run()
    first = result[0] if isinstance(result, tuple) else result
    assert first.shape == (0, 6, 64)
    assert implementations.mock_calls == []


@pytest.mark.parametrize("fmt", FORMATS)
def test_without_requests_or_pages_nothing_runs(fmt, implementations):
    assert legal_call("gather_kv", fmt, cached=(), new=()).run() is None
    call = legal_call("copy_pages", fmt)
    call["src"] = call["dst"] = np.zeros(0, np.int32)
    assert call.run() is None
    assert implementations.mock_calls == []


# --- presence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in REQUIRED[op]])
def test_a_required_tensor_is_missed(op, name, fmt, implementations):
    call = legal_call(op, fmt)
    call[name] = None
    if op == "rope_write_kv":
        for optional in ("out_k", "out_v", "cu_seqlens_k"):
            call[optional] = None
    assert fault(call, MissingTensorError, name, implementations).got == "None"


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("op", WITH_CACHE)
@pytest.mark.parametrize("name", ["k", "v", "k_scale", "v_scale", "static"])
def test_each_tensor_of_a_cache_is_missed_or_refused(op, name, fmt, implementations):
    call = legal_call(op, fmt)
    if call[f"cache.{name}"] is not None:
        call[f"cache.{name}"] = None
        fault(call, MissingTensorError, f"cache.{name}", implementations)
        return
    other = legal_call(op, "block_wise_fp8" if name != "static" else "cache_int8")
    call[f"cache.{name}"] = other[f"cache.{name}"]
    fault(call, SurplusTensorError, f"cache.{name}", implementations)


@pytest.mark.parametrize("op", WITH_CACHE)
@pytest.mark.parametrize("fmt", ["cache_int8", "cache_fp8"])
def test_zero_points_are_refused_without_a_use_for_them(op, fmt, implementations):
    call = legal_call(op, fmt)
    zp = floats(np.random.default_rng(0), (2, 64))
    call["cache.static"] = StaticScales(
        **{name: call[f"cache.static.{name}"] for name in STATIC}, k_zp=zp, v_zp=zp
    )
    fault(call, SurplusTensorError, "cache.static.k_zp", implementations)


@pytest.mark.parametrize("op", WITH_CACHE)
def test_zero_points_are_missed(op, implementations):
    call = legal_call(op, "cache_int4_zp")
    call["cache.static"] = StaticScales(**{n: call[f"cache.static.{n}"] for n in STATIC})
    fault(call, MissingTensorError, "cache.static.k_zp", implementations)


@pytest.mark.parametrize("op", WITH_CACHE)
def test_a_cache_is_missed(op, implementations):
    call = legal_call(op)
    call["cache"] = None
    fault(call, MissingTensorError, "cache", implementations)
    call["cache"] = ["k", "v"]  # an engine's list that was not resolved
    error = call.raises(DtypeError)
    assert (error.op, error.argument, error.got) == (op, "cache", "list")


@pytest.mark.parametrize("op", WITH_CACHE)
@pytest.mark.parametrize("layer_id", [-1, 1, 2**40])
def test_a_layer_outside_the_spec(op, layer_id, implementations):
    call = legal_call(op)
    call["cache.layer_id"] = layer_id
    error = call.raises(LayerIndexError)
    assert (error.op, error.argument, error.got) == (op, "layer_id", str(layer_id))
    assert implementations.mock_calls == []


@pytest.mark.parametrize("absent", ["out_k", "out_v", "cu_seqlens_k"])
def test_contiguous_outputs_come_together(absent, implementations):
    call = legal_call("rope_write_kv")
    call[absent] = None
    fault(call, MissingTensorError, absent, implementations)


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_half_a_rope(name, implementations):
    call = legal_call("rope_write_kv")
    call[f"rope.{name}"] = None
    fault(call, MissingTensorError, f"rope.{name}", implementations)


def test_a_rope_of_another_class(implementations):
    call = legal_call("rope_write_kv")
    call["rope"] = (call["rope.cos"], call["rope.sin"])
    fault(call, DtypeError, "rope", implementations)


# --- shapes -----------------------------------------------------------------------------------

# An axis that is free by itself binds the others: the error names the next tensor.
NAMED_INSTEAD = {
    ("rope_write_kv", "qkv", 1): "qkv",
    ("rope_write_kv", "out_k", 0): "out_v",
    ("rope_write_kv", "cache_seqlens", 0): "cu_seqlens_q",
    ("gather_kv", "cache_seqlens", 0): "block_table",
    ("gather_kv", "out_k", 0): "out_v",
    ("paged_attention", "q", 0): "mask_offsets",
    ("paged_attention", "cache_seqlens", 0): "cu_seqlens_q",
    ("rope_write_kv", "rope.cos", 0): "rope.sin",
    ("rope_write_kv", "rope.cos", 1): "rope.sin",
    ("masked_attention", "k", 0): "v",
    ("masked_attention", "k", 1): "v",
    ("masked_attention", "k", 2): "v",
    ("masked_attention", "q", 0): "mask_offsets",
    ("masked_attention", "q", 1): "q",
    ("masked_attention", "cu_seqlens_q", 0): "cu_seqlens_k",
    ("paged_attention", "q", 1): "q",
    ("merge_states", "out_a", 0): "lse_a",
    ("merge_states", "out_a", 1): "lse_a",
    ("merge_states", "out_a", 2): "out_b",
    ("copy_pages", "src", 0): "dst",
    **{(op, "cache.k", 0): "cache.v" for op in WITH_CACHE},
}
# One more row of nobody, one more column of pages.
FITS_ANYWAY = {
    ("rope_write_kv", "qkv", 0),
    ("rope_write_kv", "block_table", 1),
    ("gather_kv", "block_table", 1),
    ("paged_attention", "block_table", 1),
}


def every_axis():
    found = [
        (op, name, axis)
        for op in OPS
        for name, array in legal_call(op, "block_wise_fp8").arrays().items()
        for axis in range(array.ndim)
    ]
    return [axis for axis in found if axis not in FITS_ANYWAY]


@pytest.mark.parametrize(("op", "name", "axis"), every_axis())
def test_one_axis_too_long(op, name, axis, implementations):
    call = legal_call(op, "block_wise_fp8")
    array = call[name]
    call[name] = np.concatenate([array, array[(slice(None),) * axis + (slice(0, 1),)]], axis)
    named = NAMED_INSTEAD.get((op, name, axis), name)
    error = fault(call, ShapeError, named, implementations)
    assert str(call[named].shape[0]) in error.got


def every_array():
    """Op, format and name of every array there is: dynamic scales, then static ones."""
    found = []
    for op in OPS:
        found += [(op, "block_wise_fp8", n) for n in legal_call(op, "block_wise_fp8").arrays()]
        names = legal_call(op, "cache_int4_zp").arrays()
        found += [(op, "cache_int4_zp", n) for n in names if n.startswith("cache.static.")]
    return found


@pytest.mark.parametrize(("op", "fmt", "name"), every_array())
def test_one_axis_too_many(op, fmt, name, implementations):
    call = legal_call(op, fmt)
    call[name] = call[name][None]
    fault(call, ShapeError, name, implementations)


@pytest.mark.parametrize("fmt", ["cache_int8", "cache_fp8", "cache_int4_zp"])
@pytest.mark.parametrize("op", WITH_CACHE)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (64,), (2, 1), (2, 63), (64, 2), (1, 2, 64)])
def test_multipliers_of_no_known_granularity(op, fmt, shape, implementations):
    call = legal_call(op, fmt)
    for name in call["cache"].quant.static_fields:
        broken = legal_call(op, fmt)
        broken[f"cache.static.{name}"] = np.ones(shape, np.float32)
        fault(broken, ShapeError, f"cache.static.{name}", implementations)


@pytest.mark.parametrize("shape", [(2, 64), (128,)])
def test_cache_fp8_takes_no_channels_and_int4_no_heads(shape, implementations):
    call = legal_call("rope_write_kv", "cache_fp8")
    call["cache.static.v_quant"] = np.ones(shape, np.float32)
    fault(call, ShapeError, "cache.static.v_quant", implementations)
    call = legal_call("rope_write_kv", "cache_int4_zp")
    call["cache.static.v_quant"] = np.ones(2, np.float32)
    fault(call, ShapeError, "cache.static.v_quant", implementations)


@pytest.mark.parametrize("width", [4 * 64, 3 * 64, 9 * 64, 10 * 64 + 1, 10 * 32, 0])
def test_a_width_that_is_no_number_of_heads(width, implementations):
    call = legal_call("rope_write_kv")
    call["qkv"] = np.zeros((7, width), np.float32)
    fault(call, ShapeError, "qkv", implementations)


@pytest.mark.parametrize("op", ["paged_attention", "masked_attention"])
@pytest.mark.parametrize("heads", [0, 1, 3, 7])
def test_query_heads_that_are_no_multiple(op, heads, implementations):
    call = legal_call(op)
    call["q"] = np.zeros((7, heads, 64), np.float32)
    call["out"] = call["sinks"] = None
    fault(call, ShapeError, "q", implementations)


@pytest.mark.parametrize(("kv_heads", "dim"), [(0, 64), (2, 0)])
def test_no_heads_and_no_elements(kv_heads, dim, implementations):
    call = legal_call("masked_attention")
    call["k"] = call["v"] = np.zeros((29, kv_heads, dim), np.float32)
    call["q"] = np.zeros((7, 6, dim), np.float32)
    call["out"] = None
    fault(call, ShapeError, "q", implementations)


@pytest.mark.parametrize("half", [0, 33, 64])
def test_rotary_dims_that_no_head_has(half, implementations):
    call = legal_call("rope_write_kv")
    call["rope"] = Rope(np.zeros((40, half), np.float32), np.zeros((40, half), np.float32))
    fault(call, ShapeError, "rope.cos", implementations)


@pytest.mark.parametrize("op", ["rope_write_kv", "paged_attention", "masked_attention"])
def test_a_running_sum_has_a_first_entry(op, implementations):
    call = legal_call(op)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if name in call.arguments:
            call[name] = np.zeros(0, np.int32)
    error = fault(call, ShapeError, "cu_seqlens_q", implementations)
    assert error.got == "[0]"


def test_rope_tables_of_different_shape(implementations):
    call = legal_call("rope_write_kv")
    call["rope.sin"] = call["rope.sin"][:-1]
    fault(call, ShapeError, "rope.sin", implementations)


def test_an_odd_rotary_dim_has_no_tables():
    with pytest.raises(ShapeError, match=r"Rope\.from_theta: rotary_dim: .* got 7"):
        Rope.from_theta(1e4, 7, 10)


# --- dtypes, libraries, devices ---------------------------------------------------------------

WRONG_DTYPE = {"f": np.float64, "i": np.int64, "V": np.uint16, "u": np.uint16}


@pytest.mark.parametrize(("op", "fmt", "name"), every_array())
def test_a_wrong_dtype(op, fmt, name, implementations):
    call = legal_call(op, fmt)
    call[name] = np.zeros(call[name].shape, WRONG_DTYPE[call[name].dtype.kind])
    error = fault(call, DtypeError, name, implementations)
    assert error.got == call[name].dtype.name
    assert isinstance(error, TypeError)


@pytest.mark.parametrize(("op", "fmt", "name"), every_array())
def test_no_tensor_at_all(op, fmt, name, implementations):
    call = legal_call(op, fmt)
    call[name] = [1.0]
    error = call.raises(DtypeError)
    assert (error.op, error.argument) == (op, name)
    assert "list" in error.got
    assert implementations.mock_calls == []


@pytest.mark.parametrize("op", WITH_CACHE)
@pytest.mark.parametrize("fmt", ["none", "cache_int8", "cache_int4_zp"])
def test_storage_of_another_format(op, fmt, implementations):
    call = legal_call(op, fmt)
    other = {"none": np.uint8, "cache_int8": np.float32, "cache_int4_zp": np.int8}[fmt]
    call["cache.v"] = np.zeros(call["cache.v"].shape, other)
    fault(call, DtypeError, "cache.v", implementations)


@pytest.mark.parametrize("op", WITH_CACHE)
def test_paged_scales_of_another_dtype_than_the_spec_s(op, implementations):
    call = legal_call(op, "block_wise_fp8", scale_dtype="bfloat16")
    call["cache.k_scale"] = np.zeros(call["cache.k_scale"].shape, np.float32)
    fault(call, DtypeError, "cache.k_scale", implementations)


def test_states_of_two_dtypes(implementations):
    call = legal_call("merge_states")
    call["out_b"] = call["out_b"].astype(np.float16)
    fault(call, DtypeError, "out_b", implementations)


@pytest.mark.parametrize(("op", "name"), [("masked_attention", "v"), ("gather_kv", "out_v")])
def test_k_and_v_of_two_dtypes(op, name, implementations):
    call = legal_call(op)
    call[name] = call[name].astype(np.float16)
    fault(call, DtypeError, name, implementations)


@pytest.mark.parametrize("op", ["paged_attention", "masked_attention"])
def test_an_out_of_another_dtype_than_q(op, implementations):
    call = legal_call(op)
    call["out"] = call["out"].astype(np.float16)
    fault(call, DtypeError, "out", implementations)


def test_swapped_bytes(implementations):
    call = legal_call("paged_attention")
    call["q"] = call["q"].astype(">f4")
    assert fault(call, DtypeError, "q", implementations).got == ">f4"


class OtherTensor:
    """A tensor of a library that this machine lacks, on a device of it."""

    device = "xpu:0"

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype


class OtherHostTensor(OtherTensor):
    """The same, on the CPU."""

    device = "cpu"


@pytest.fixture
def other_library(monkeypatch):
    """Makes fastkv know both."""
    real = arrays.describe

    def describe(array, op="describe", argument="array"):
        if isinstance(array, OtherTensor):
            info = real(array.array, op, argument)
            return info._replace(library="otherlibrary", device=array.device)
        return real(array, op, argument)

    def zeros_like(_, shape, dtype):
        return OtherTensor(np.zeros(shape, arrays.numpy_dtype(dtype)))

    def maker(shape, dtype, _):
        return lambda: OtherTensor(np.zeros(shape, arrays.numpy_dtype(dtype)))

    monkeypatch.setattr("fastkv.contracts.tensors.describe", describe)
    monkeypatch.setattr("fastkv.arrays.describe", describe)
    monkeypatch.setattr("fastkv.arrays.zeros_like", zeros_like)
    monkeypatch.setattr("fastkv.arrays.on_device", lambda _: SimpleNamespace(maker=maker))


@pytest.mark.usefixtures("other_library")
@pytest.mark.parametrize("op", OPS)
def test_tensors_of_two_libraries(op, implementations):
    call = legal_call(op)
    name = REQUIRED[op][-1]
    call[name] = OtherHostTensor(call[name])
    error = fault(call, PlacementError, name, implementations)
    assert "numpy tensor on cpu" in error.expected
    assert error.got == "a otherlibrary tensor on cpu"


@pytest.mark.parametrize(("op", "fmt", "name"), every_array())
@pytest.mark.usefixtures("other_library")
def test_tensors_of_two_devices(op, fmt, name, implementations):
    call = legal_call(op, fmt)
    call[name] = OtherTensor(call[name])
    error = call.raises(PlacementError)
    assert error.op == op
    assert "xpu:0" in error.expected + error.got
    assert "numpy" in error.expected + error.got
    assert implementations.mock_calls == []


@pytest.fixture
def other_call(other_library, monkeypatch):
    """A legal call whose tensors all live on a device."""

    def make(op, device):
        monkeypatch.setattr(OtherTensor, "device", device)
        call = legal_call(op, "block_wise_fp8")
        for name in call.arrays():
            call[name] = OtherTensor(call[name])
        return call

    return make


@pytest.mark.usefixtures("fresh_dispatch")
@pytest.mark.parametrize("op", OPS)
def test_a_gpu_tensor_runs_on_its_kernel_and_never_on_the_reference(op, mocker, other_call):
    reference = mocker.patch(f"fastkv.ops.reference.{op}.{op}")
    kernel = mocker.Mock()
    mocker.patch.dict(sys.modules, {f"fastkv.ops.cuda.{op}": SimpleNamespace(**{op: kernel})})
    call = other_call(op, "cuda:0")
    call.run()
    assert kernel.call_count == 1
    checker, *positional = kernel.call_args.args
    assert checker.op == op
    assert positional[0] is next(iter(call.arguments.values()))
    assert reference.call_count == 0


@pytest.mark.parametrize("op", OPS)
def test_a_tensor_elsewhere_runs_nowhere(op, other_call, implementations):
    error = other_call(op, "xpu:0").raises(UnsupportedError)
    assert (error.op, error.argument, error.got) == (op, "device", "xpu:0")
    assert "never runs on the reference" in error.hint
    assert implementations.mock_calls == []


# --- what is written must be writeable --------------------------------------------------------

WRITTEN = [
    *[("rope_write_kv", n) for n in ("cache.k", "cache.v", "cache.k_scale", "cache.v_scale")],
    *[("copy_pages", n) for n in ("cache.k", "cache.v", "cache.k_scale", "cache.v_scale")],
    *[(op, n) for op in ("rope_write_kv", "gather_kv") for n in ("out_k", "out_v")],
    ("paged_attention", "out"),
    ("masked_attention", "out"),
]


@pytest.mark.parametrize(("op", "name"), WRITTEN)
def test_read_only_memory_is_refused(op, name, implementations):
    call = legal_call(op, "block_wise_fp8")
    call[name].flags.writeable = False
    fault(call, ReadOnlyError, name, implementations)


@pytest.mark.parametrize("op", OPS)
def test_read_only_inputs_are_fine(op):
    call = legal_call(op, "block_wise_fp8")
    for name, array in call.arrays().items():
        if (op, name) not in WRITTEN:
            array.flags.writeable = False
    call.run()


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["paged_attention", "masked_attention"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("window", [0, -1, 2.0, "3", math.nan]),
        ("soft_cap", [0, 0.0, -1.0, math.nan, math.inf, "3"]),
        ("scale", [math.nan, math.inf, "1"]),
    ],
)
def test_numbers_out_of_range(op, name, values, implementations):
    for value in values:
        call = legal_call(op)
        call[name] = value
        error = fault(call, ContractError, name, implementations)
        assert error.got == repr(value)


@pytest.mark.parametrize("value", [-1e-6, math.nan, math.inf, None, "1"])
def test_an_epsilon_out_of_range(value, implementations):
    call = legal_call("rope_write_kv")
    call["norm_eps"] = value
    fault(call, ContractError, "norm_eps", implementations)


@pytest.mark.parametrize("op", ["paged_attention", "masked_attention"])
def test_numpy_numbers_are_numbers(op):
    call = legal_call(op)
    call["window"], call["soft_cap"], call["scale"] = np.int32(9), np.float32(5), np.float64(0.2)
    out, lse = call.run()
    again, lse_again = legal_call(op).run()
    np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(lse, lse_again)


def test_a_checked_call_knows_which_tensors_it_was_given():
    given = legal_call("gather_kv", "block_wise_fp8").arguments
    names = ("cache", "cache_seqlens", "block_table", "cu_seqlens_k", "out_k", "out_v")
    checker = calls.gather_kv(*(given[name] for name in names))
    assert checker.given("out_k")
    assert checker.given("cache.k_scale")
    assert not checker.given("out")
