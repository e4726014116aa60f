# SPDX-License-Identifier: Apache-2.0
"""CuPy arrays."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import cupy

from fastkv.arrays.library import ArrayInfo, Library, OnDevice, cuda_index, distinct, numpy_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray


@cache
def _dtype_name(dtype: Any) -> str:
    return str(dtype.name)


def _describe(array: Any, _: str, __: str) -> ArrayInfo:
    apart = array.flags.c_contiguous or distinct(array.shape, array.strides)
    return ArrayInfo(
        "cupy", f"cuda:{array.device.id}", _dtype_name(array.dtype), array.shape, apart
    )


def _storage(dtype: str) -> Any:
    # CuPy has no float8; the ops take its bytes as uint8.
    return numpy_dtype("uint8" if dtype.startswith("float8") else dtype)


def _zeros(shape: tuple[int, ...], dtype: str, device: str) -> Any:
    with cupy.cuda.Device(cuda_index("zeros", "cupy", device)):
        return cupy.zeros(shape, _storage(dtype))


def _to_host(_: Any, info: ArrayInfo) -> "NDArray[Any]":
    raise AssertionError(f"a CuPy array is never on the CPU: {info}")


def _from_host(host: "NDArray[Any]", device: str) -> Any:
    with cupy.cuda.Device(cuda_index("from_host", "cupy", device)):
        return cupy.asarray(host.view(_storage(host.dtype.name)))


def _signature(array: Any) -> Any:
    return cupy.ndarray, array.shape, array.strides, array.dtype, array.data.device_id


def _pointer(array: Any) -> int:
    return int(array.data.ptr)


def _strides(array: Any) -> tuple[int, ...]:
    return tuple(stride // array.itemsize for stride in array.strides)


def _maker(shape: tuple[int, ...], dtype: str, index: int) -> Callable[[], Any]:
    storage = _storage(dtype)

    def make() -> Any:
        if index == cupy.cuda.runtime.getDevice():
            return cupy.empty(shape, storage)
        with cupy.cuda.Device(index):
            return cupy.empty(shape, storage)

    return make


def _stream(index: int) -> int:
    return int(cupy.cuda.get_current_stream(index).ptr)


LIBRARY = Library(
    _describe,
    _zeros,
    _to_host,
    _from_host,
    OnDevice(_signature, _pointer, _strides, _maker, _stream),
)
