# SPDX-License-Identifier: Apache-2.0
"""Paddle tensors."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import paddle
from paddle.utils.dlpack import from_dlpack

from fastkv.arrays.library import (
    ArrayInfo,
    Library,
    OnDevice,
    cuda_index,
    distinct,
    not_strided,
    view,
)
from fastkv.dtypes import ITEMSIZE
from fastkv.errors import MissingDependencyError

# PyPI's paddlepaddle-gpu ends at 2.6.2, without float8 and much else; a source build says 0.0.0.
if (_version := str(paddle.version.full_version)).startswith(("1.", "2.")):
    raise MissingDependencyError(
        "A paddle tensor",
        f"Paddle 3 (found {_version})",
        "pip install 'paddlepaddle-gpu>=3.0' --extra-index-url "
        "https://www.paddlepaddle.org.cn/packages/stable/cu126/ (CPU: 'paddlepaddle>=3.3')",
    )

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Paddle neither fills nor imports all of the dtypes, but views any of a size as another.
_RAW: dict[int, Any] = {1: "uint8", 2: "int16", 4: "float32", 8: "int64"}

_dtype_names: dict[int, str] = {}  # by the enumeration's number: hashing a Paddle dtype is slow


def _describe(array: Any, op: str, argument: str) -> ArrayInfo:
    if not array.is_dense():
        raise not_strided(op, argument, "a sparse tensor", "Make it dense.")
    dtype = array.dtype
    name = _dtype_names.get(dtype.value) or _name(dtype)
    device = str(array.place)[6:-1].replace("gpu", "cuda")  # "Place(cpu)", "Place(gpu:0)"
    shape = tuple(array.shape)
    apart = array.is_contiguous() or distinct(shape, tuple(array.strides))
    return ArrayInfo("paddle", device, name, shape, apart)


def _name(dtype: Any) -> str:
    return _dtype_names.setdefault(dtype.value, str(dtype).rpartition(".")[2])


def _place(op: str, device: str) -> Any:
    if device == "cpu":
        return paddle.CPUPlace()
    return paddle.CUDAPlace(cuda_index(op, "paddle", device))


def _zeros(shape: tuple[int, ...], dtype: str, device: str) -> Any:
    raw = _RAW[ITEMSIZE[dtype]]
    return _as(dtype, raw, paddle.zeros(list(shape), dtype=raw, device=_place("zeros", device)))


def _to_host(array: Any, info: ArrayInfo) -> "NDArray[Any]":
    return view(array, info, array.data_ptr(), tuple(array.strides))


def _from_host(host: "NDArray[Any]", device: str) -> Any:
    raw = _RAW[host.itemsize]
    bits = host.view(raw)
    if device == "cpu":
        return _as(host.dtype.name, raw, from_dlpack(bits))
    return _as(host.dtype.name, raw, paddle.to_tensor(bits, place=_place("from_host", device)))


def _as(dtype: Any, raw: str, tensor: Any) -> Any:
    return tensor if dtype == raw else tensor.view(dtype)


# Never run on a GPU (docs, "Limits"). Pointer and true dtype, and not the tensor's
# __cuda_array_interface__, which calls bfloat16 float16 and has no float8.
def _signature(array: Any) -> Any:
    place = array.place
    if not place.is_gpu_place():
        return None
    shape, strides = tuple(array.shape), tuple(array.strides)
    return paddle.Tensor, shape, strides, array.dtype.value, place.gpu_device_id()


def _pointer(array: Any) -> int:
    return int(array.data_ptr())


def _strides(array: Any) -> tuple[int, ...]:
    return tuple(array.strides)


def _maker(shape: tuple[int, ...], dtype: str, index: int) -> Callable[[], Any]:
    raw, place = _RAW[ITEMSIZE[dtype]], paddle.CUDAPlace(index)
    return lambda: _as(dtype, raw, paddle.empty(list(shape), dtype=raw, device=place))


def _stream(index: int) -> int:
    return int(paddle.device.current_stream(paddle.CUDAPlace(index)).stream_base.cuda_stream)


LIBRARY = Library(
    _describe,
    _zeros,
    _to_host,
    _from_host,
    OnDevice(_signature, _pointer, _strides, _maker, _stream),
)
