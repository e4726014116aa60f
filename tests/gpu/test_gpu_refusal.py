# SPDX-License-Identifier: Apache-2.0
"""On a GPU: tensors of CuPy and PyTorch are recognized, and never run on the reference."""

from dataclasses import replace

import numpy as np
import pytest

from fastkv import CacheSpec, LayerCache, arrays, ops
from fastkv.backends import get_backend
from fastkv.errors import PlacementError, SelectionError, UnsupportedError
from fastkv.ops import dispatch
from fastkv.quant import QUANT_SPECS

DEVICE = "cuda:0"


@pytest.fixture(params=["cupy", "torch"])
def library(request):
    return request.param


def on_gpu(array, library):
    return arrays.convert(array, library, DEVICE)


def make_cache(quant, library):
    spec = CacheSpec(1, 2, 64, 16, quant, dtype="float16")
    names = ("k", "v", "k_scale", "v_scale")
    return LayerCache(spec, 0, **dict(zip(names, spec.allocate(4, library, DEVICE), strict=False)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "int32"])
def test_tensors_are_described_as_what_they_are(library, dtype):
    made = arrays.zeros(library, (3, 5), dtype, DEVICE)
    assert arrays.describe(made)[:4] == (library, DEVICE, dtype, (3, 5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_torch_has_the_short_floats_on_the_gpu(dtype):
    made = arrays.zeros("torch", (3, 5), dtype, DEVICE)
    assert arrays.describe(made)[:4] == ("torch", DEVICE, dtype, (3, 5))


def test_merge_states_is_refused_and_not_computed(library, mocker):
    rng = np.random.default_rng(0)
    out = on_gpu(rng.standard_normal((3, 4, 64)).astype(np.float32), library)
    lse = on_gpu(rng.standard_normal((3, 4)).astype(np.float32), library)
    to_host = mocker.spy(arrays, "to_host")
    with pytest.raises(UnsupportedError, match="no CUDA kernels") as error:
        ops.merge_states(out, lse, out, lse)
    assert error.value.got == DEVICE
    assert to_host.call_count == 0


def test_copy_pages_is_refused(library):
    cache = make_cache("none", library)
    ids = on_gpu(np.array([1, 2], np.int32), library)
    with pytest.raises(UnsupportedError, match="never runs on the reference"):
        ops.copy_pages(cache, ids, ids)


def test_cpu_tensors_beside_gpu_tensors_are_refused_by_name(library):
    cache = make_cache("none", library)
    ids = np.array([1], np.int32)
    with pytest.raises(PlacementError) as error:
        ops.copy_pages(cache, ids, ids)
    assert error.value.argument == "src"
    assert DEVICE in error.value.expected
    with pytest.raises(PlacementError):
        ops.copy_pages(replace(cache, v=np.zeros((4, 2, 16, 64), np.float16)), ids, ids)


@pytest.mark.parametrize("quant", list(QUANT_SPECS))
def test_selection_refuses_every_format_with_the_reason(quant):
    spec = CacheSpec(1, 8, 128, 64, quant)
    with pytest.raises(SelectionError, match="no CUDA kernels"):
        get_backend(spec, name="auto", device="cuda:90")


def test_doctor_sees_this_gpu():
    from fastkv.cli.devices import found_devices

    devices, notes = found_devices()
    assert devices[1].kind == "cuda"
    assert devices[1].sm >= 70
    assert notes


def test_dispatch_names_the_device():
    with pytest.raises(UnsupportedError, match=DEVICE):
        dispatch.implementation("gather_kv", DEVICE)
