# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for modules that are not installed."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fastkv.errors import ContractError

_ABSENT = object()


@contextmanager
def stub_module(name: str, /, **attributes: Any) -> Iterator[ModuleType]:
    """Put a module in `sys.modules` for a while.

    `import a.b`, `from a import b` and `importlib.util.find_spec("a.b")` then find it. A parent
    that is loaded, or can be, is the real one, and `b` is attached to it; any other is a stub too.
    On the way out, by an exception as well, `sys.modules` and the attributes of the parents are
    as they were. A real parent that had to be imported stays imported, as after any import.

    Args:
        name: dotted name. A module of that name which is there is hidden for the time.
        attributes: what the module holds.

    Yields:
        The module.

    Raises:
        ContractError: a name that no module can have.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ContractError("stub_module", "name", expected="a dotted name", got=repr(name))
    with ExitStack() as undo:
        parent: ModuleType | None = None
        for end in range(1, len(parts)):
            path = ".".join(parts[:end])
            parent = _real(path) or _enter(undo, _stub(path), parent)
        stub = _enter(undo, _stub(name), parent)
        vars(stub).update(attributes)
        yield stub


def _real(name: str) -> ModuleType | None:
    if name in sys.modules:
        return sys.modules[name]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # it is there, and something of its own is missing
        return None


def _stub(name: str) -> ModuleType:
    stub = ModuleType(name, f"Stands in for {name}.")
    stub.__spec__ = ModuleSpec(name, loader=None, is_package=True)
    stub.__path__ = []
    return stub


def _enter(undo: ExitStack, stub: ModuleType, parent: ModuleType | None) -> ModuleType:
    """Register a stub, attach it to its parent, and push what takes both back."""
    name = stub.__name__
    _replace(undo, sys.modules, name, stub)
    if parent is not None:
        _replace(undo, vars(parent), name.rpartition(".")[2], stub)
    return stub


def _replace(undo: ExitStack, where: dict[str, Any], key: str, value: object) -> None:
    # `vars` of a module and not `getattr`: a lazy parent must not load what is being hidden.
    before = where.get(key, _ABSENT)
    where[key] = value
    if before is _ABSENT:
        undo.callback(where.pop, key, None)
    else:
        undo.callback(where.__setitem__, key, before)
