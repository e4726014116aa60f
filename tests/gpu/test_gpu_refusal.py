# SPDX-License-Identifier: Apache-2.0
"""On a GPU: tensors are recognized, and what no kernel serves is refused by name, not computed."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from fastkv import CacheSpec, LayerCache, arrays, ops
from fastkv.backends import Device, get_backend, kernels, select_backend
from fastkv.cli.devices import found_devices
from fastkv.errors import PlacementError, SelectionError, UnsupportedError
from fastkv.ops.cuda import jit, launch, serve
from fastkv.quant import QUANT_SPECS
from helpers.on_gpu import DEVICE, bytes_of, gpu_call, to_gpu


@pytest.fixture(params=["cupy", "torch"])
def library(request):
    return request.param


@pytest.fixture
def nothing_runs(mocker):
    """A context in which nothing computes: no launch, no copy to the host."""
    spies = [mocker.spy(launch.Kernel, "launch"), mocker.spy(arrays, "to_host")]

    @contextmanager
    def watch():
        before = [spy.call_count for spy in spies]
        yield
        assert [spy.call_count for spy in spies] == before

    return watch


def make_cache(quant, library):
    spec = CacheSpec(1, 2, 64, 16, quant, dtype="float16")
    names = ("k", "v", "k_scale", "v_scale")
    return LayerCache(spec, 0, **dict(zip(names, spec.allocate(4, library, DEVICE), strict=False)))


# --- what a tensor is -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "int32"])
def test_tensors_are_described_as_what_they_are(library, dtype):
    made = arrays.zeros(library, (3, 5), dtype, DEVICE)
    assert arrays.describe(made)[:4] == (library, DEVICE, dtype, (3, 5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_torch_has_the_short_floats_on_the_gpu(dtype):
    made = arrays.zeros("torch", (3, 5), dtype, DEVICE)
    assert arrays.describe(made)[:4] == ("torch", DEVICE, dtype, (3, 5))


def test_doctor_sees_this_gpu():
    devices, notes = found_devices()
    assert devices[1].kind == "cuda"
    assert devices[1].sm == jit.device_facts(0).sm
    assert notes


# --- tensors in two places --------------------------------------------------------------------


def test_cpu_tensors_beside_gpu_tensors_are_refused_by_name(library, nothing_runs):
    cache = make_cache("none", library)
    ids = np.array([1], np.int32)
    with nothing_runs(), pytest.raises(PlacementError) as error:
        ops.copy_pages(cache, ids, ids)
    assert error.value.argument == "src"
    assert DEVICE in error.value.expected
    with nothing_runs(), pytest.raises(PlacementError) as error:
        ops.copy_pages(replace(cache, v=np.zeros((4, 2, 16, 64), np.float16)), ids, ids)
    assert error.value.argument == "cache.v"


def test_tensors_of_two_libraries_are_refused_by_name(nothing_runs):
    cache = make_cache("none", "torch")
    ids = to_gpu(np.array([1], np.int32), "cupy")
    with nothing_runs(), pytest.raises(PlacementError) as error:
        ops.copy_pages(cache, ids, ids)
    assert (error.value.argument, error.value.got) == ("src", f"a cupy tensor on {DEVICE}")


# --- dtypes that no kernel takes --------------------------------------------------------------


def test_masked_attention_in_float32_is_refused_and_not_computed(library, nothing_runs):
    call = gpu_call("masked_attention", "none", library, dtype="float32")
    before = bytes_of(call["out"])
    with nothing_runs(), pytest.raises(UnsupportedError) as error:
        call.run()
    assert (error.value.op, error.value.argument) == ("masked_attention", "q")
    assert (error.value.expected, error.value.got) == (
        "bfloat16 or float16 on a GPU",
        "float32",
    )
    assert bytes_of(call["out"]) == before


@pytest.mark.parametrize("name", ["append", "flash", "flash_mask"])
@pytest.mark.parametrize("quant", list(QUANT_SPECS))
def test_every_backend_is_selectable(name, quant):
    spec = CacheSpec(1, 8, 128, 64, quant)
    assert get_backend(spec, name=name, device="cuda:90").name == name


# --- what the kernels of this device serve ----------------------------------------------------


@pytest.mark.parametrize("quant", list(QUANT_SPECS))
def test_selection_answers_for_this_gpu(quant):
    device = Device("cuda", jit.device_facts(0).sm)
    spec = CacheSpec(1, 8, 128, 64, quant)
    least = 89 if spec.storage_dtype(0) == "float8_e4m3fn" else 80
    if device.sm >= least:
        assert select_backend("auto", spec, device).kernel == "cuda"
    else:
        with pytest.raises(SelectionError, match=f"needs sm_{least}"):
            select_backend("auto", spec, device)


def table_without(**changes):
    row = kernels.KERNELS["cuda"]
    return {"cuda": replace(row, **changes)}


# A table that serves less than the legal call asks for -> what the error says.
LESS = {
    "sm": ({"min_sm": 999}, "device", "needs sm_999 or newer"),
    "storage sm": ({"min_sm_by_storage": {"float16": 999}}, "device", "float16 needs sm_999"),
    "head dim": ({"head_dims": (128,)}, "head_dim", "head dim 64 is none of 128"),
    "page size": ({"page_sizes": (64,)}, "page_size", "page size 16 is none of 64"),
    "storage": ({"storage": ("int8",)}, "dtype", "no float16 cache"),
}


# The kernels of the other ops serve any shape; they refuse what the device lacks.
ATTENTION = [("paged_attention", less) for less in LESS]
OTHERS = [("copy_pages", "sm"), ("copy_pages", "storage sm"), ("gather_kv", "sm")]
OTHERS += [("gather_kv", "storage sm"), ("rope_write_kv", "sm"), ("rope_write_kv", "storage sm")]
OTHERS += [("merge_states", "sm")]  # it has no cache
OTHERS += [("masked_attention", "sm"), ("masked_attention", "head dim")]  # nor has it


@pytest.mark.parametrize(("op", "less"), ATTENTION + OTHERS)
def test_an_op_refuses_what_the_table_does_not_serve(op, less, library, monkeypatch, nothing_runs):
    changes, argument, reason = LESS[less]
    call = gpu_call(op, "none", library, kv_heads=3, group=5)
    monkeypatch.setattr(serve, "KERNELS", table_without(**changes))
    with nothing_runs(), pytest.raises(UnsupportedError) as error:
        call.run()
    assert (error.value.op, error.value.argument) == (op, argument)
    assert reason in str(error.value)


def test_attention_refuses_more_query_heads_than_the_table_serves(library, nothing_runs):
    call = gpu_call("paged_attention", "none", library, group=17)
    match = "17 query heads a KV head are outside 1 to 16"
    with nothing_runs(), pytest.raises(UnsupportedError, match=match):
        call.run()
