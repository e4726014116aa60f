# SPDX-License-Identifier: Apache-2.0
"""A contract is checked once for each set of metadata that GPU tensors come with.

An engine makes the same call for each layer and step; comparing a dozen shapes anew would cost
more than the launch. What a contract can see of its arguments is the key, so a remembered check
is never one of another call. Calls with a tensor on the CPU, and faulty ones, are checked anew.

Tensors are mutable: `resize_` or `transpose_` changes one that stays the same object. So no
identity stands for a tensor's metadata, in a layer's cache neither: each call looks at all of it.
What a frozen bundle does keep is which tensors it has.
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
    """A check that passed, and the specs whose ids are in its key: they live as long."""

    checker: "Checker"
    specs: list[Any]


# Tests of tensors' metadata, and the checks that each stands for; the newest first.
_Recent = tuple[tuple[Callable[..., bool], "Checker"], ...]


def remembered(contract: "Callable[..., Checker]") -> "Callable[..., Checker]":
    """Decorate a contract, which takes positional arguments only."""
    known: dict[Any, _Known] = {}
    recent: dict[Any, _Recent] = {}

    @wraps(contract)
    def check(*args: Any) -> "Checker":
        structure, tensors = _split(args)
        for alike, checker in recent.get(structure, ()):
            if alike(*tensors):
                return checker
        signatures = [signature(tensor) for tensor in tensors]
        if None in signatures:
            return contract(*args)
        key = (structure, *signatures)
        found = known.get(key)
        if found is None:
            if len(known) >= _MOST:
                known.clear()
                recent.clear()
            specs = [arg.spec for arg in args if type(arg) is LayerCache]
            found = known[key] = _Known(contract(*args), specs)
        # Made anew for a known key too: PyTorch's test also sees its modes, inference_mode say.
        test = likeness(tensors)
        if test is not None:
            recent[structure] = ((test, found.checker), *recent.get(structure, ())[: _RECENT - 1])
        return found.checker

    return check


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
    """A hashable of all that is no tensor, with a mark for each; and the tensors in order."""
    structure: list[Any] = []
    tensors: list[Any] = []
    for arg in args:
        kind = type(arg)
        if arg is None:
            structure.append(None)
        elif kind not in _NO_TENSORS:
            structure.append(...)
            tensors.append(arg)
        elif kind in _VALUES:
            structure += kind, arg  # 1, 1.0 and True are one key, and not one contract
        else:
            token, own = _flat(arg)
            structure.append(token)
            tensors += own
    return tuple(structure), tensors


def _flat(bundle: Any) -> tuple[Any, tuple[Any, ...]]:
    """A bundle's part of `_split`. It is frozen, so what it says is true as long as it lives."""
    try:
        found: tuple[Any, tuple[Any, ...]] = bundle._flat
    except AttributeError:
        found = _BUNDLES[type(bundle)](bundle)
        object.__setattr__(bundle, "_flat", found)
    return found


def _flat_cache(cache: LayerCache) -> tuple[Any, tuple[Any, ...]]:
    marks, tensors = _marked(cache.k, cache.v, cache.k_scale, cache.v_scale)
    scales, own = _flat_static(cache.static)
    tensors += own
    if type(cache.layer_id) is int:
        return (id(cache.spec), cache.layer_id, marks, scales), tensors
    # True equals 1, and a list has no hash.
    return (_FOREIGN, marks, scales), (*tensors, _FOREIGN)


def _flat_static(static: Any) -> tuple[Any, tuple[Any, ...]]:
    if static is None:
        return None, ()
    return _flat(static) if type(static) is StaticScales else (_FOREIGN, (_FOREIGN,))


def _flat_rope(rope: Rope) -> tuple[Any, tuple[Any, ...]]:
    return _marked(rope.cos, rope.sin)


def _flat_scales(static: StaticScales) -> tuple[Any, tuple[Any, ...]]:
    scales = (static.k_quant, static.k_dequant, static.v_quant, static.v_dequant)
    return _marked(*scales, static.k_zp, static.v_zp)


def _marked(*fields: Any) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """The places of the fields that are there; and those."""
    there = {place: field for place, field in enumerate(fields) if field is not None}
    return tuple(there), tuple(there.values())


_BUNDLES: dict[type, Callable[[Any], tuple[Any, tuple[Any, ...]]]] = {
    LayerCache: _flat_cache,
    Rope: _flat_rope,
    StaticScales: _flat_scales,
}
_NO_TENSORS = _VALUES | _BUNDLES.keys()
