# SPDX-License-Identifier: Apache-2.0
"""GPU tests: legal calls, batches and caches on a device, and their bytes back on the host.

The legal calls of `helpers.calls` with every tensor moved. Bytes are moved and never values, so
that poison stays what it is; 16-bit tensors in place of the float32 ones, which the kernels of
attention do not take.
"""

import os
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np

from fastkv import CacheSpec, arrays
from fastkv.arrays import numpy_dtype
from helpers.calls import Call, legal_call

DEVICE = "cuda:0"


def to_gpu(value, library, device=DEVICE):
    """A copy with every NumPy array moved; reaches into dataclasses, dicts and lists."""
    if isinstance(value, np.ndarray):
        return arrays.convert(np.ascontiguousarray(value), library, device)
    return _map(value, lambda part: to_gpu(part, library, device))


def to_cpu(value):
    """The same with NumPy copies of every GPU tensor, in its true dtype where CuPy lacks it."""
    if _is_tensor(value):
        return _host(value)
    return _map(value, to_cpu)


def bytes_of(tensor):
    """A tensor's bytes in C order."""
    return _host(tensor).tobytes()


def assign(tensor, array):
    """Write a NumPy array's bytes into a GPU tensor in place, on its library's current stream."""
    if type(tensor).__module__.partition(".")[0] == "cupy":
        tensor[...] = to_gpu(array, "cupy", f"cuda:{tensor.device.id}").view(tensor.dtype)
    else:
        moved = to_gpu(array, "torch", str(tensor.device))
        tensor.copy_(moved.view(tensor.dtype))


def tensors_in(value):
    """Every GPU tensor within a call's arguments or results, in a fixed order."""
    if _is_tensor(value):
        return [value]
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif is_dataclass(value) and not isinstance(value, CacheSpec):
        parts = [getattr(value, field.name) for field in fields(value) if field.init]
    else:
        parts = []
    return [tensor for part in parts for tensor in tensors_in(part)]


def snapshot(value):
    """The bytes of every GPU tensor within."""
    return [bytes_of(tensor) for tensor in tensors_in(value)]


def synchronize(device=DEVICE):
    """Wait for everything on a device."""
    import cupy

    with cupy.cuda.Device(int(device[5:])):
        cupy.cuda.runtime.deviceSynchronize()


def gpu_call(op, fmt="none", library="torch", *, dtype="float16", device=DEVICE, **shape):
    """A legal call of an op on a device, in `dtype` wherever the kernels take no float32."""
    call = host_call(op, fmt, dtype=dtype, **shape)
    return Call(op, {name: to_gpu(a, library, device) for name, a in call.arguments.items()})


def host_call(op, fmt="none", *, dtype="float16", **shape):
    """The same call on the host, for the reference."""
    shape = {"dtype": dtype} | shape
    call = legal_call(op, fmt, **shape)
    for name in ("qkv", "q", "k", "v", "out", "out_k", "out_v", "out_a", "out_b"):
        if isinstance(call.arguments.get(name), np.ndarray):
            with np.errstate(all="ignore"):
                call.arguments[name] = call.arguments[name].astype(numpy_dtype(dtype))
    return call


def map_tensors(value, change):
    """The same with every GPU tensor changed; reaches as far as `tensors_in`."""
    return (
        change(value) if _is_tensor(value) else _map(value, lambda part: map_tensors(part, change))
    )


def with_helpers():
    """The environment in which a new interpreter finds these helpers."""
    tests = str(Path(__file__).resolve().parents[1])
    return {"PYTHONPATH": os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))}


def gpu_devices():
    """`cuda:N` of every device that CuPy sees; at least one name, so that tests collect."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except Exception:  # no library or no driver: the tests that use the names will skip
        count = 0
    return [f"cuda:{i}" for i in range(max(1, count))]


def _map(value, change):
    if isinstance(value, dict):
        return {name: change(part) for name, part in value.items()}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(change(part) for part in value)
    if isinstance(value, list):
        return [change(part) for part in value]
    if isinstance(value, CacheSpec) or not is_dataclass(value):
        return value
    parts = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    return replace(value, **{name: change(part) for name, part in parts.items()})


def _is_tensor(value):
    library = type(value).__module__.partition(".")[0]
    return library in {"cupy", "torch", "paddle"} and hasattr(value, "shape")


def _host(tensor):
    if isinstance(tensor, np.ndarray):
        return tensor
    if type(tensor).__module__.partition(".")[0] == "cupy":
        return tensor.get()
    return arrays.to_host(tensor.detach().cpu()).copy()
