# SPDX-License-Identifier: Apache-2.0
"""NumPy arrays."""

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.arrays.library import ArrayInfo, Library, distinct, numpy_dtype
from fastkv.errors import DtypeError, PlacementError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@cache
def _dtype_name(dtype: "np.dtype[Any]") -> str:
    return dtype.name if dtype.isnative else dtype.str  # ">f4" is no dtype that fastkv names


def _describe(array: Any, _: str, __: str) -> ArrayInfo:
    flags = array.flags
    apart = flags.c_contiguous or distinct(array.shape, array.strides)
    name = _dtype_name(array.dtype)
    return ArrayInfo("numpy", "cpu", name, array.shape, flags.writeable and apart)


def _zeros(shape: tuple[int, ...], dtype: str, device: str) -> Any:
    _require_cpu("zeros", device)
    return np.zeros(shape, numpy_dtype(dtype))


def _to_host(array: Any, info: ArrayInfo) -> "NDArray[Any]":
    if not array.dtype.isnative:
        raise DtypeError("to_host", "array", expected="the machine's byte order", got=info.dtype)
    return np.asarray(array)  # a subclass, such as np.matrix, indexes in its own way


def _from_host(host: "NDArray[Any]", device: str) -> Any:
    _require_cpu("from_host", device)
    return host


def _require_cpu(op: str, device: str) -> None:
    if device != "cpu":
        raise PlacementError(op, "device", expected="cpu for numpy", got=device)


LIBRARY = Library(_describe, _zeros, _to_host, _from_host)
