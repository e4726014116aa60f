# SPDX-License-Identifier: Apache-2.0
"""Ops that write down how they were called."""

import inspect
from dataclasses import dataclass
from typing import Any

from fastkv.testing.sentinels import SentinelTensor


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an op.

    Attributes:
        op: the op's name.
        args: positional arguments.
        kwargs: keyword arguments.
        arguments: all of them, by the names that the op's signature gives them.
        result: what was returned.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: dict[str, Any]
    result: Any


class RecordingOps:
    """Stands in for `fastkv.ops`: records each call, and returns sentinels.

    A call that the real op's signature does not take raises `TypeError`, as there.

    Args:
        through: ops to run as well, `fastkv.ops` for example; their results are returned then.

    Attributes:
        calls: the calls, in order.
    """

    def __init__(self, through: Any = None) -> None:
        self.calls: list[Call] = []
        self._through = through

    def names(self) -> list[str]:
        """The ops called, in order."""
        return [call.op for call in self.calls]

    def only(self, op: str) -> Call:
        """The one call of an op; raises `AssertionError` unless there was exactly one."""
        found = [call for call in self.calls if call.op == op]
        if len(found) != 1:
            raise AssertionError(f"expected one call of {op}, got {len(found)}: {self.names()}")
        return found[0]

    def rope_write_kv(self, *args: Any, **kwargs: Any) -> Any:
        """Records; returns q, with `return_kv` (q, k, v)."""
        return self._record("rope_write_kv", args, kwargs)

    def gather_kv(self, *args: Any, **kwargs: Any) -> None:
        """Records."""
        self._record("gather_kv", args, kwargs)

    def paged_attention(self, *args: Any, **kwargs: Any) -> Any:
        """Records; returns out, with `return_lse` (out, lse)."""
        return self._record("paged_attention", args, kwargs)

    def masked_attention(self, *args: Any, **kwargs: Any) -> Any:
        """Records; returns out, with `return_lse` (out, lse)."""
        return self._record("masked_attention", args, kwargs)

    def merge_states(self, *args: Any, **kwargs: Any) -> Any:
        """Records; returns (out, lse)."""
        return self._record("merge_states", args, kwargs)

    def copy_pages(self, *args: Any, **kwargs: Any) -> None:
        """Records."""
        self._record("copy_pages", args, kwargs)

    def zeros_beside(self, *args: Any, **kwargs: Any) -> Any:
        """Records; returns a sentinel of the shape asked for."""
        return self._record("zeros_beside", args, kwargs)

    def _record(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from fastkv import ops

        arguments = inspect.signature(getattr(ops, op)).bind(*args, **kwargs).arguments
        if self._through is None:
            result = _RESULTS[op](f"call {len(self.calls)}, {op}: ", arguments)
        else:
            result = getattr(self._through, op)(*args, **kwargs)
        self.calls.append(Call(op, args, kwargs, arguments, result))
        return result


def _written(owner: str, arguments: dict[str, Any]) -> Any:
    spec = getattr(arguments["cache"], "spec", None)
    shape, dtype = _shape(arguments["qkv"]), getattr(arguments["qkv"], "dtype", None)
    q_shape = kv_shape = None
    if spec is not None and shape is not None and len(shape) == 2:
        heads = shape[1] // spec.head_dim - 2 * spec.num_kv_heads
        q_shape = (shape[0], heads, spec.head_dim)
        kv_shape = (shape[0], spec.num_kv_heads, spec.head_dim)
    q = SentinelTensor(owner + "q", q_shape, dtype)
    if not arguments.get("return_kv"):
        return q
    return q, *(SentinelTensor(owner + name, kv_shape, dtype) for name in ("k", "v"))


def _attended(owner: str, arguments: dict[str, Any]) -> Any:
    q, out = arguments["q"], arguments.get("out")
    shape = _shape(q)
    if out is None:
        out = SentinelTensor(owner + "out", shape, getattr(q, "dtype", None))
    if not arguments.get("return_lse"):
        return out
    return out, SentinelTensor(owner + "lse", shape and shape[:2], "float32")


def _merged(owner: str, arguments: dict[str, Any]) -> Any:
    names = {"out": "out_a", "lse": "lse_a"}
    return tuple(
        SentinelTensor(owner + new, _shape(arguments[old]), getattr(arguments[old], "dtype", None))
        for new, old in names.items()
    )


def _zeros(owner: str, arguments: dict[str, Any]) -> Any:
    dtype = getattr(arguments["like"], "dtype", None)
    return SentinelTensor(owner + "zeros", tuple(arguments["shape"]), dtype)


def _nothing(owner: str, arguments: dict[str, Any]) -> None:
    return None


def _shape(tensor: object) -> tuple[int, ...] | None:
    shape = getattr(tensor, "shape", None)
    return None if shape is None else tuple(shape)


# Op -> what it returns.
_RESULTS = {
    "rope_write_kv": _written,
    "gather_kv": _nothing,
    "paged_attention": _attended,
    "masked_attention": _attended,
    "merge_states": _merged,
    "copy_pages": _nothing,
    "zeros_beside": _zeros,
}
