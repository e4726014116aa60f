# SPDX-License-Identifier: Apache-2.0
"""A contract is checked once for each set of metadata that GPU tensors come with.

An engine makes the same call for each layer and step; comparing a dozen shapes anew would cost
more than the launch. What a contract can see of its arguments is the key, so a remembered check
is never one of another call. Calls with a tensor on the CPU, and faulty ones, are checked anew.
"""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from fastkv.arrays import signature
from fastkv.cache import LayerCache
from fastkv.rope import Rope
from fastkv.scales import StaticScales

if TYPE_CHECKING:
    from fastkv.contracts.tensors import Checker

# Batches come in many sizes; past this many all are forgotten, and checked again.
_MOST = 4096
_VALUES = frozenset({type(None), bool, int, float, str})


def remembered(contract: "Callable[..., Checker]") -> "Callable[..., Checker]":
    """Decorate a contract, which takes positional arguments only."""
    known: dict[Any, tuple[Checker, Any]] = {}

    @wraps(contract)
    def check(*args: Any) -> "Checker":
        key = _key(args)
        if key is None:
            return contract(*args)
        found = known.get(key)
        if found is None:
            if len(known) >= _MOST:
                known.clear()
            # The specs live as long as their entry: the key holds their ids.
            specs = [arg.spec for arg in args if type(arg) is LayerCache]
            found = known[key] = (contract(*args), specs)
        return found[0]

    return check


def _key(args: tuple[Any, ...]) -> Any:
    """A hashable of all that a contract can see; None where one of the tensors has none."""
    parts: list[Any] = []
    for arg in args:
        kind = type(arg)
        if kind in _VALUES:
            parts.append(kind)  # 1, 1.0 and True are one key, and not one contract
            parts.append(arg)
        elif kind is LayerCache:
            parts.append(id(arg.spec))
            parts.append(arg.layer_id)
            if not _add(parts, (arg.k, arg.v, arg.k_scale, arg.v_scale)):
                return None
            if arg.static is not None and not _add_static(parts, arg.static):
                return None
        elif kind is Rope:
            if not _add(parts, (arg.cos, arg.sin)):
                return None
        elif not _add(parts, (arg,)):
            return None
    return tuple(parts)


def _add_static(parts: list[Any], static: Any) -> bool:
    if type(static) is not StaticScales:
        return False
    scales = (static.k_quant, static.k_dequant, static.v_quant, static.v_dequant)
    return _add(parts, scales) and _add(parts, (static.k_zp, static.v_zp))


def _add(parts: list[Any], tensors: tuple[Any, ...]) -> bool:
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
            continue
        key = signature(tensor)
        if key is None:
            return False
        parts.append(key)
    return True
