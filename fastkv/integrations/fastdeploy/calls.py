# SPDX-License-Identifier: Apache-2.0
"""What the engine's ops share: argument counts of several versions, refusals, names in errors."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from fastkv.errors import ContractError, UnsupportedError

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: The version of the engine whose signatures the functions have.
VERSION = "develop of January 2026"

# Argument of an op, or attribute of a layer -> why fastkv does not serve it.
_UNSERVED = {
    "attn_mask": "a dense mask; intervals of keys per row are served, as mask offsets",
    "compressed_kv": "MLA, which caches a latent vector and not K and V",
    "head_wise_full_hidden": "a window for some of the heads",
    "k_pe": "MLA, which caches a latent vector and not K and V",
    "kv_signal_data": "the signal that sends a layer's cache to another machine",
    "linear_shift": "the quantization of the output for the next layer",
    "linear_smooth": "the quantization of the output for the next layer",
    "out_linear_in_scale": "the quantization of the output for the next layer",
    "out_scale": "the quantization of the output for the next layer",
    "qkv_scale": "qkv as int32 sums of a quantized product",
    "rope_3d": "rotary tables of one request each",
    "sink_size": "keys that stay visible before the window; attention sinks are served",
}


def refuse_unserved(op: str, fmt: str | None, given: Mapping[str, Any], prefix: str = "") -> None:
    """Raise `UnsupportedError` for the first argument that is set and that fastkv does not serve.

    None, False, 0 and negative numbers are how the engine says that one is not set.

    Args:
        op: names the caller in the error.
        fmt: format of the cache, for the error.
        given: arguments by name; those that fastkv serves are passed over.
        prefix: stands before the name in the error, such as `layer.`.
    """
    for name, why in _UNSERVED.items():
        value = given.get(name)
        if value is None or (isinstance(value, bool | int | float) and value <= 0):
            continue
        got = repr(value) if isinstance(value, bool | int | float) else type(value).__name__
        raise UnsupportedError(
            op,
            f"{prefix}{name}",
            format=fmt,
            expected="nothing: fastkv does not serve it",
            got=got,
            hint=f"It is {why}.",
        )


def older_calls(*omitted: tuple[str, ...]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Also serve the positional calls of older versions of the engine, told apart by their count.

    Args:
        omitted: for each older version the parameters that its op does not have; they take their
            defaults, or None.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        op = getattr(function, "__name__", "")
        parameters = inspect.signature(function).parameters
        names = tuple(parameters)
        required = {
            name: None for name in names if parameters[name].default is inspect.Parameter.empty
        }
        served = {len(names): names}
        for gone in omitted:
            kept = tuple(name for name in names if name not in gone)
            assert len(kept) == len(names) - len(gone), f"{op} has no such parameters: {gone}"
            served[len(kept)] = kept
        versions = [f"{len(names)} ({VERSION})"]
        versions += [f"{len(names) - len(gone)} (without {', '.join(gone)})" for gone in omitted]

        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if kwargs:
                return function(*args, **kwargs)
            if len(args) not in served:
                expected = f"{' or '.join(versions)} arguments"
                raise ContractError(op, "the arguments", expected=expected, got=str(len(args)))
            by_name: dict[str, Any] = dict(zip(served[len(args)], args, strict=True))
            return function(**(required | by_name))  # type: ignore[call-arg]

        return call

    return decorate


@contextmanager
def reported_as(op: str, names: Mapping[str, str]) -> Iterator[None]:
    """Give errors of fastkv's ops the engine's names: op and argument as the caller spells them.

    Args:
        op: the engine's op.
        names: fastkv's argument -> the engine's.
    """
    try:
        yield
    except ContractError as error:
        spelled = re.match(r"[\w.]+", error.argument)
        if spelled is not None and spelled[0] in names:
            error.argument = names[spelled[0]] + error.argument[spelled.end() :]
        error.op = op
        raise
