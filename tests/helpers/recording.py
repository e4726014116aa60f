# SPDX-License-Identifier: Apache-2.0
"""Ops that write down how they were called."""

from typing import Any, NamedTuple

from helpers.sentinels import Sentinel


class Call(NamedTuple):
    """One call of an op."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class RecordingOps:
    """Stands in for `fastkv.ops`; returns sentinels, or what `through` returns.

    Args:
        through: ops to call as well; None calls nothing.
    """

    def __init__(self, through=None):
        self.calls = []
        self._through = through

    def names(self):
        return [call.op for call in self.calls]

    def only(self, op):
        (call,) = [call for call in self.calls if call.op == op]
        return call

    def _record(self, op, args, kwargs, result):
        if self._through is not None:
            result = getattr(self._through, op)(*args, **kwargs)
        self.calls.append(Call(op, args, kwargs, result))
        return result

    def zeros_beside(self, *args, **kwargs):
        return self._record("zeros_beside", args, kwargs, Sentinel(f"zeros {len(self.calls)}"))

    def rope_write_kv(self, *args, **kwargs):
        return self._record("rope_write_kv", args, kwargs, Sentinel("q"))

    def gather_kv(self, *args, **kwargs):
        return self._record("gather_kv", args, kwargs, None)

    def paged_attention(self, *args, **kwargs):
        return self._attend("paged_attention", args, kwargs)

    def masked_attention(self, *args, **kwargs):
        return self._attend("masked_attention", args, kwargs)

    def _attend(self, op, args, kwargs):
        out = kwargs.get("out")
        return self._record(op, args, kwargs, Sentinel(f"out of {op}") if out is None else out)


def everything_in(value, seen=None):
    """Every object reachable from a call's arguments: containers, dataclasses, attributes."""
    seen = {} if seen is None else seen
    if id(value) in seen or isinstance(value, str | int | float | type(None)):
        return list(seen.values())
    seen[id(value)] = value
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    else:
        slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
        names = [*slots, *getattr(value, "__dict__", {})]
        parts = [getattr(value, name) for name in names if hasattr(value, name)]
    for part in parts:
        everything_in(part, seen)
    return list(seen.values())
