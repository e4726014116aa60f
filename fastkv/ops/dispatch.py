# SPDX-License-Identifier: Apache-2.0
"""From the device of a call's tensors to the code that runs it."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastkv import arrays
from fastkv.cache import LayerCache
from fastkv.errors import UnsupportedError
from fastkv.rope import Rope
from fastkv.scales import StaticScales

if TYPE_CHECKING:
    from fastkv.contracts.tensors import Checker


def run(checker: "Checker", *args: Any, **kwargs: Any) -> None:
    """Run the op of a checked call; it writes its results into the tensors it is given."""
    assert checker.first is not None, "a contract describes at least one tensor"
    implementation(checker.op, checker.first.device)(*args, **kwargs)


def result(checker: "Checker", shape: tuple[str, ...], dtype: str) -> Any:
    """A zero-filled result in the caller's library, on the caller's device.

    Args:
        checker: the checked call.
        shape: in the call's symbols, `("T", "Hq", "D")` say.
        dtype: of the result.
    """
    assert checker.first is not None, "a contract describes at least one tensor"
    implementation(checker.op, checker.first.device)  # refuse a device before allocating on it
    return arrays.zeros_like(checker.first, tuple(checker.sizes[s] for s in shape), dtype)


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


def implementation(op: str, device: str) -> Callable[..., None]:
    """The code that runs an op on a device; raises `UnsupportedError` where there is none."""
    if device == "cpu":
        function = getattr(import_module(f"fastkv.ops.reference.{op}"), op)
        return lambda *args, **kwargs: function(
            *map(_host, args), **{name: _host(value) for name, value in kwargs.items()}
        )
    raise UnsupportedError(
        op,
        "device",
        expected="cpu: this version has no CUDA kernels",
        got=device,
        hint="A tensor elsewhere never runs on the reference; move it yourself to run there.",
    )


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
