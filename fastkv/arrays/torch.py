# SPDX-License-Identifier: Apache-2.0
"""PyTorch tensors."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from fastkv.arrays.library import (
    ArrayInfo,
    Library,
    OnDevice,
    distinct,
    not_strided,
    view,
)
from fastkv.errors import PlacementError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STRIDED = torch.strided
_device_name = cache(str)
_device = partial(torch.device, "cuda")


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


# A complex tensor's parts, of these dtypes, may have bits that negate each read.
_PARTS = frozenset({torch.float16, torch.float32, torch.float64})
_on_gpu: dict[Any, bool] = {}  # by device: asking a dictionary is cheaper than asking the tensor


def _signature(array: Any) -> Any:
    device, dtype = array.device, array.dtype
    on_gpu = _on_gpu.get(device)
    if on_gpu is None:
        on_gpu = _on_gpu[device] = device.type == "cuda"
    if not on_gpu or (dtype in _PARTS and array.is_neg()):
        return None
    return array.shape, array.stride(), dtype, device


# The allocation of torch.compile's generated code, on the current device: half the public call's
# cost or less, as neither arguments are parsed nor a dispatcher asked.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_empty_here = getattr(_guards, "_empty_strided_cuda", None)
_current_device = getattr(torch._C, "_cuda_getDevice", None)


def _maker(shape: tuple[int, ...], dtype: str, index: int) -> Callable[[], Any]:
    strides = accumulate(reversed(shape[1:]), lambda stride, n: stride * max(n, 1), initial=1)
    what = (shape, tuple(strides)[::-1], getattr(torch, dtype))
    # `torch.empty` takes a microsecond more of the host.
    anywhere = partial(torch.empty_strided, *what[:2], dtype=what[2], device=_device(index))
    here, current = _empty_here, _current_device
    if here is None or current is None or not _makes_dense(index):
        return anywhere

    def make() -> Any:
        return here(*what) if current() == index else anywhere()

    return make


@cache
def _makes_dense(index: int) -> bool:
    """Whether this PyTorch's `_empty_here`, which is no public name, does what is asked of it."""
    assert _empty_here is not None, "asked where it is there"
    device = _device(index)
    try:
        with torch.cuda.device(device):
            made = _empty_here((2, 3), (3, 1), torch.float16)
        found = made.shape, made.stride(), made.dtype, made.device, made.requires_grad
        return bool(found == ((2, 3), (3, 1), torch.float16, device, False))
    except (AttributeError, TypeError, RuntimeError):
        return False


def _stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# The test of torch.compile's guards: a dozen tensors in a microsecond, in place of ten.
_TensorGuards: Any = getattr(_guards, "TensorGuards", None)


def _likeness(tensors: Sequence[Any]) -> Callable[..., bool]:
    kept = {id(tensor): place for place, tensor in enumerate(tensors)}
    if len(kept) < len(tensors):  # of which PyTorch's test is never true
        return _likeness_of_twins(tensors, kept)
    # An empty list: no dimension is dynamic, each is held to the tensor's own.
    guards = _TensorGuards(*tensors, dynamic_dims_sizes=[], dynamic_dims_strides=[])
    alike: Callable[..., bool] = guards.check
    return alike


def _likeness_of_twins(tensors: Sequence[Any], kept: dict[int, int]) -> Callable[..., bool]:
    """Some tensors come twice: of each one place is kept, and the other must have the same."""
    pairs = [(place, kept[id(tensor)]) for place, tensor in enumerate(tensors)]
    twins = [(place, other) for place, other in pairs if place != other]
    once = _likeness([tensors[place] for place in kept.values()])

    def alike(*others: Any) -> bool:
        for place, twin in twins:
            if others[place] is not others[twin]:
                return False
        return once(*[others[place] for place in kept.values()])

    return alike


def _tells_apart() -> bool:
    """Whether this PyTorch's guards, which are no public name, do what is asked of them."""
    sample = torch.empty((2, 3), dtype=torch.int32, device="cpu")
    others = [sample.view(3, 2), sample[:1], sample.view(6), sample.as_strided((2, 3), (1, 2))]
    others += [sample.view(torch.float32), sample.to("meta"), sample.to_sparse()]
    try:
        alike = _likeness((sample, sample.clone()))
        same = alike(sample, sample.clone()) is True
        return same and not any(alike(sample, other) for other in others)
    except (AttributeError, TypeError, RuntimeError):
        return False


# A tenth of the public call's cost; torch.compile's generated code calls it too.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _stream)

LIBRARY = Library(
    _describe,
    _zeros,
    _to_host,
    _from_host,
    OnDevice(
        _signature,
        torch.Tensor.data_ptr,
        torch.Tensor.stride,
        _maker,
        _raw_stream,
        _likeness if _tells_apart() else None,
    ),
)
