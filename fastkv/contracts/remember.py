# SPDX-License-Identifier: Apache-2.0
"""A contract is checked once for each set of metadata that GPU tensors come with.

An engine makes the same call for each layer and step; comparing a dozen shapes anew would cost
more than the launch. What a contract can see of its arguments is the key, so a remembered check
is never one of another call. Calls with a tensor on the CPU, and faulty ones, are checked anew.

Tensors are mutable: `resize_` or `transpose_` changes one that stays the same object. So no
identity stands for a tensor's metadata, in a layer's cache neither: each call looks at all of it.
"""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkv.arrays import likeness, signature
from fastkv.cache import LayerCache
from fastkv.rope import Rope
from fastkv.scales import StaticScales

if TYPE_CHECKING:
    from fastkv.contracts.tensors import Checker

# Batches come in many sizes; past this many all are forgotten, and checked again.
_MOST = 4096
# Of one structure, the metadata that are compared before the key is made: a step's prefill and
# decode rows, and a few more.
_RECENT = 4
_VALUES = frozenset({bool, int, float, str})
# Has no signature: stands for what a key cannot hold, so that the call is not remembered.
_FOREIGN = object()


class _Known(NamedTuple):
    """A check that passed.

    Attributes:
        checker: its result.
        alike: whether tensors have the same metadata; None where the library has no such test.
        specs: kept as long as the entry, since the key holds their ids.
    """

    checker: "Checker"
    alike: Callable[..., bool] | None
    specs: list[Any]


def remembered(contract: "Callable[..., Checker]") -> "Callable[..., Checker]":
    """Decorate a contract, which takes positional arguments only."""
    known: dict[Any, _Known] = {}
    recent: dict[Any, tuple[_Known, ...]] = {}

    @wraps(contract)
    def check(*args: Any) -> "Checker":
        structure, tensors = _split(args)
        latest = recent.get(structure, ())
        for found in latest:
            if found.alike is not None and found.alike(*tensors):
                return found.checker
        signatures = [signature(tensor) for tensor in tensors]
        if None in signatures:
            return contract(*args)
        key = (structure, *signatures)
        entry = known.get(key)
        if entry is None:
            if len(known) >= _MOST:
                known.clear()
                recent.clear()
                latest = ()
            specs = [arg.spec for arg in args if type(arg) is LayerCache]
            entry = known[key] = _Known(contract(*args), likeness(tensors), specs)
        if entry.alike is not None:
            recent[structure] = (entry, *latest[: _RECENT - 1])
        return entry.checker

    return check


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
    """All that is no tensor, hashable, with a mark where one stands; and the tensors in order."""
    structure: list[Any] = []
    tensors: list[Any] = []
    for arg in args:
        kind = type(arg)
        if arg is None:
            structure.append(None)
        elif kind in _VALUES:
            structure += kind, arg  # 1, 1.0 and True are one key, and not one contract
        elif kind is LayerCache:
            structure += kind, id(arg.spec)
            structure.append(arg.layer_id if type(arg.layer_id) is int else None)
            if structure[-1] is None:  # True equals 1, and a list has no hash
                tensors.append(_FOREIGN)
            _add(structure, tensors, (arg.k, arg.v, arg.k_scale, arg.v_scale))
            _add_static(structure, tensors, arg.static)
        elif kind is Rope:
            structure.append(kind)
            _add(structure, tensors, (arg.cos, arg.sin))
        else:
            structure.append(...)
            tensors.append(arg)
    return tuple(structure), tensors


def _add_static(structure: list[Any], tensors: list[Any], static: Any) -> None:
    if type(static) is StaticScales:
        structure.append(StaticScales)
        scales = (static.k_quant, static.k_dequant, static.v_quant, static.v_dequant)
        _add(structure, tensors, (*scales, static.k_zp, static.v_zp))
    else:
        _add(structure, tensors, (None if static is None else _FOREIGN,))


def _add(structure: list[Any], tensors: list[Any], fields: tuple[Any, ...]) -> None:
    for tensor in fields:
        if tensor is None:
            structure.append(None)
        else:
            structure.append(...)
            tensors.append(tensor)
