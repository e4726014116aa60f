# SPDX-License-Identifier: Apache-2.0
"""The few array operations that libraries spell differently, and that run once a step or call."""

from importlib import import_module
from typing import Any

from fastkv import arrays
from fastkv.arrays import ArrayInfo, numpy_dtype


def cast(array: Any, info: ArrayInfo, dtype: str) -> Any:
    """The tensor in another dtype; itself where it has it."""
    if info.dtype == dtype:
        return array
    if info.library == "numpy":
        return array.astype(numpy_dtype(dtype))
    if info.library == "torch":
        return array.to(getattr(import_module("torch"), dtype))
    return array.astype(dtype)


def empty(info: ArrayInfo, shape: tuple[int, ...], dtype: str) -> Any:
    """A tensor beside another, to be written: zeros on the CPU, anything on a GPU."""
    index = arrays.gpu_index(info.device)
    if index is None:
        return arrays.zeros_like(info, shape, dtype)
    return arrays.on_device(info.library).maker(shape, dtype, index)()


def rows_and_requests(sums: Any, info: ArrayInfo, rows: int) -> tuple[Any, Any]:
    """Row numbers, and the request of each: both `[rows]`, on the device.

    Args:
        sums: int32 cu_seqlens_q `[B+1]` that begin with 0, B at least 1.
        info: of `sums`.
        rows: T. Rows behind the last request count to it.
    """
    library = import_module(info.library)
    like: dict[str, Any] = {"dtype": sums.dtype}
    if info.library == "torch":
        like["device"] = sums.device
    numbers = library.arange(rows, **like)
    right: dict[str, Any] = {"right": True}
    if info.library not in ("torch", "paddle"):
        right = {"side": "right"}
    found = library.searchsorted(sums[1:], numbers, **right)
    return numbers, found.clip(0, info.shape[0] - 2)
