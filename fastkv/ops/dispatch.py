# SPDX-License-Identifier: Apache-2.0
"""From the device of a call's tensors to the code that runs it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastkv import arrays
from fastkv.cache import LayerCache
from fastkv.errors import UnsupportedError
from fastkv.rope import Rope
from fastkv.scales import StaticScales

if TYPE_CHECKING:
    from fastkv.contracts.tensors import Checker


def runner(checker: "Checker") -> Callable[..., None]:
    """What runs the op of a checked call; it writes its results into the tensors it is given."""
    assert checker.first is not None, "a contract describes at least one tensor"
    device = checker.first.device
    if arrays.gpu_index(device) is not None:
        return partial(_function("cuda", checker.op), checker)
    if device == "cpu":
        return partial(_on_host, _function("reference", checker.op))
    raise _no_kernels(checker, device)


def result(checker: "Checker", shape: tuple[str, ...], dtype: str, *, needed: bool = True) -> Any:
    """A result in the caller's library, on the caller's device.

    Zero-filled on the CPU. On a GPU the kernel writes every element, so nothing fills it before.

    Args:
        checker: the checked call.
        shape: in the call's symbols, `("T", "Hq", "D")` say.
        dtype: of the result.
        needed: whether the caller's caller gets it. The reference always writes it; a kernel
            does without, and gets None.
    """
    assert checker.first is not None, "a contract describes at least one tensor"
    if not needed and arrays.gpu_index(checker.first.device) is not None:
        return None
    make = checker.makers.get((shape, dtype))
    if make is None:
        make = checker.makers[shape, dtype] = _maker(checker, checker.first, shape, dtype)
    return make()


def _maker(
    checker: "Checker", first: arrays.ArrayInfo, shape: tuple[str, ...], dtype: str
) -> Callable[[], Any]:
    sizes = tuple(checker.sizes[symbol] for symbol in shape)
    index = arrays.gpu_index(first.device)
    if index is not None:
        return arrays.on_device(first.library).maker(sizes, dtype, index)
    if first.device != "cpu":
        raise _no_kernels(checker, first.device)  # before allocating on it
    return partial(arrays.zeros_like, first, sizes, dtype)


def zeros_beside(like: Any, shape: tuple[int, ...]) -> Any:
    """A zero-filled tensor of `like`'s library, device and dtype.

    Backends use it for the gathered K and V and for a batch's shared output.
    """
    info = arrays.describe(like, "zeros_beside", "like")
    return arrays.zeros_like(info, shape, info.dtype)


def check_values(checker: "Checker", *args: Any) -> None:
    """Check the values of a step where reading them costs no synchronization: on the CPU."""
    assert checker.first is not None, "a contract describes at least one tensor"
    if checker.first.device == "cpu":
        from fastkv.ops.reference.values import check_step

        check_step(checker.op, checker.sizes["T"], *map(_host, args))


@cache
def _function(implementation: str, op: str) -> Callable[..., None]:
    module = import_module(f"fastkv.ops.{implementation}.{op}")
    function: Callable[..., None] = getattr(module, op)
    return function


def _no_kernels(checker: "Checker", device: str) -> UnsupportedError:
    return UnsupportedError(
        checker.op,
        "device",
        expected="a tensor on the CPU or on an NVIDIA GPU",
        got=device,
        hint="A tensor elsewhere never runs on the reference; move it yourself to run there.",
    )


def _on_host(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    function(*map(_host, args), **{name: _host(value) for name, value in kwargs.items()})


def _host(value: Any) -> Any:
    """NumPy views of every tensor in an argument."""
    if isinstance(value, LayerCache):
        names = ("k", "v", "k_scale", "v_scale", "static")
        return replace(value, **{name: _host(getattr(value, name)) for name in names})
    if isinstance(value, StaticScales):
        return value.map(_host)
    if isinstance(value, Rope):
        return replace(value, cos=_host(value.cos), sin=_host(value.sin))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return arrays.to_host(value)
