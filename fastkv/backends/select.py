# SPDX-License-Identifier: Apache-2.0
"""Which backend and which kernels serve a request, and why not the others."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastkv.backends.append import AppendBackend
from fastkv.backends.base import Backend, Ops
from fastkv.backends.features import (
    BACKEND_NAMES,
    BACKENDS,
    refusals,
    require_features,
)
from fastkv.backends.flash import FlashBackend
from fastkv.backends.flash_mask import FlashMaskBackend
from fastkv.backends.kernels import KERNELS, Device, Kernels, kernel_refusals
from fastkv.contracts.numbers import is_integer
from fastkv.errors import ContractError, SelectionError, unknown_name
from fastkv.spec import CacheSpec

#: Names the backend where the caller does not.
ENVIRONMENT_VARIABLE = "FASTKV_ATTENTION_BACKEND"

_AUTO = "auto"
_CLASSES: dict[str, type[Backend]] = {
    cls.name: cls for cls in (AppendBackend, FlashBackend, FlashMaskBackend)
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What was selected, and why.

    Attributes:
        backend: its name.
        kernel: name of the kernels that run it.
        reason: why this one.
        rejected: `(backend, reason)` of each one that was considered before it.
    """

    backend: str
    kernel: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()

    def create(self, ops: Ops | None = None) -> Backend:
        """The backend itself, driving `ops` (None: `fastkv.ops`)."""
        return _CLASSES[self.backend](ops)


def select_backend(
    name: str,
    spec: CacheSpec,
    device: Device | str = "cpu",
    features: Iterable[str] = (),
    *,
    num_query_heads: int | None = None,
    kernels: Mapping[str, Kernels] = KERNELS,
) -> Choice:
    """Select a backend. A pure function: same arguments, same answer.

    An explicit name is never overridden: it is selected, or the error says why it cannot be. Only
    `auto` looks further, and says what it passed over.

    Args:
        name: `append`, `flash`, `flash_mask` or `auto`.
        spec: the cache; its formats and head dim must be served on the device.
        device: where the tensors live: a `Device`, `"cpu"`, or `"cuda:90"` for a GPU of compute
            capability 9.0.
        features: what layers and batches will ask for, names from `FEATURES`.
        num_query_heads: Hq, a multiple of the spec's KV heads; None leaves it to the ops.
        kernels: the table of kernels; tests pass their own.

    Raises:
        UnknownNameError: a name or feature outside the table; lists the table.
        ContractError: a device or a number of query heads that cannot be.
        SelectionError: nothing serves the request; with each reason.
    """
    asked = require_features(features, op="select_backend")
    where = Device.of(device)
    if name not in (*BACKEND_NAMES, _AUTO):
        raise unknown_name("select_backend", "name", name, (*BACKEND_NAMES, _AUTO))
    _require_query_heads(num_query_heads, spec)
    row, missing = kernel_refusals(kernels, spec, where, num_query_heads)
    rejected: list[tuple[str, str]] = []
    for candidate in BACKEND_NAMES if name == _AUTO else (name,):
        reasons = [*missing, *refusals(BACKENDS[candidate], asked)]
        if row is not None and not reasons:
            why = "asked for by name" if name != _AUTO else _why_auto(asked, rejected)
            return Choice(candidate, row.name, why, tuple(rejected))
        rejected.append((candidate, "; ".join(reasons)))
    needs = f" with {', '.join(sorted(asked))}" if asked else ""
    raise SelectionError(f"{name!r} on {where}{needs}", rejected)


def name_from_environment(environ: Mapping[str, str] | None = None) -> str:
    """The backend name that `FASTKV_ATTENTION_BACKEND` sets, `auto` where it is unset or empty.

    Raises:
        UnknownNameError: it is misspelt; lists the names.
    """
    name = (os.environ if environ is None else environ).get(ENVIRONMENT_VARIABLE) or _AUTO
    if name not in (*BACKEND_NAMES, _AUTO):
        raise unknown_name(
            "name_from_environment", ENVIRONMENT_VARIABLE, name, (*BACKEND_NAMES, _AUTO)
        )
    return name


def get_backend(
    spec: CacheSpec,
    *,
    name: str | None = None,
    device: Device | str = "cpu",
    features: Iterable[str] = (),
    num_query_heads: int | None = None,
    ops: Any = None,
) -> Backend:
    """Select and create a backend.

    Args:
        spec: the cache it will serve.
        name: None takes what `FASTKV_ATTENTION_BACKEND` says, or `auto`.
        device: as in `select_backend`.
        features: as in `select_backend`.
        num_query_heads: as in `select_backend`.
        ops: the ops to drive; None takes `fastkv.ops`.
    """
    wanted = name_from_environment() if name is None else name
    choice = select_backend(wanted, spec, device, features, num_query_heads=num_query_heads)
    return choice.create(ops)


def _require_query_heads(count: int | None, spec: CacheSpec) -> None:
    heads = spec.num_kv_heads
    if count is None or (is_integer(count) and count >= 1 and count % heads == 0):
        return
    raise ContractError(
        "select_backend",
        "num_query_heads",
        expected=f"None or a multiple of the {heads} KV heads",
        got=repr(count),
    )


def _why_auto(asked: frozenset[str], rejected: list[tuple[str, str]]) -> str:
    serves = f"the first that serves {', '.join(sorted(asked))}" if asked else "the default"
    passed = ", ".join(name for name, _ in rejected)
    return f"{serves}; passed over: {passed}" if passed else serves
