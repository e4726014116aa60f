# SPDX-License-Identifier: Apache-2.0
"""PyTorch tensors."""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from fastkv.arrays.library import ArrayInfo, Library, distinct, not_strided, view
from fastkv.errors import PlacementError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STRIDED = torch.strided
_device_name = cache(str)


@cache
def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(array: Any, op: str, argument: str) -> ArrayInfo:
    if array.layout is not _STRIDED or array.is_nested:
        kind = "nested" if array.is_nested else str(array.layout)
        raise not_strided(op, argument, f"a {kind} tensor", "Make it dense.")
    if array.is_neg() or array.is_conj():  # bits that negate or conjugate each read
        got = "a lazily negated or conjugated tensor"
        raise not_strided(op, argument, got, "Call resolve_neg() or resolve_conj().")
    device, dtype = _device_name(array.device), _dtype_name(array.dtype)
    shape = tuple(array.shape)
    apart = array.is_contiguous() or distinct(shape, array.stride())
    return ArrayInfo("torch", device, dtype, shape, apart)


def _zeros(shape: tuple[int, ...], dtype: str, device: str) -> Any:
    if device.startswith("cuda") and not torch.cuda.is_available():
        expected = "a device that this PyTorch sees"
        raise PlacementError("zeros", "device", expected=expected, got=device)
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)


def _to_host(array: Any, info: ArrayInfo) -> "NDArray[Any]":
    return view(array, info, array.data_ptr(), array.stride())


def _from_host(host: "NDArray[Any]", device: str) -> Any:
    bits = torch.from_numpy(host.view(f"u{host.itemsize}"))
    return bits.view(getattr(torch, host.dtype.name)).to(device)


LIBRARY = Library(_describe, _zeros, _to_host, _from_host)
