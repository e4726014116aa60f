# SPDX-License-Identifier: Apache-2.0
"""The backends and what each serves: one table.

Accepted names, error texts, `fastkv select` and the documentation all read it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from fastkv.errors import UnsupportedError, unknown_name

Feature = Literal[
    "window", "soft_cap", "sinks", "mask_offsets_on_prefill", "mask_offsets_on_decode"
]
#: What a layer or a batch may ask for beyond causal attention.
FEATURES: tuple[Feature, ...] = get_args(Feature)


@dataclass(frozen=True, slots=True)
class BackendRow:
    """One backend.

    Attributes:
        name: its public name.
        prefill: ops that serve prefill rows, in order.
        decode: ops that serve decode and draft rows, in order.
        refuses: features that it does not serve, each with the reason.
        summary: one line for people.
    """

    name: str
    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    summary: str
    refuses: Mapping[Feature, str] = field(default_factory=lambda: MappingProxyType({}))


# In the order in which `auto` tries them.
_ROWS = (
    BackendRow(
        name="append",
        prefill=("rope_write_kv", "paged_attention"),
        decode=("rope_write_kv", "paged_attention"),
        summary="attention over the pages for every row; nothing is gathered",
    ),
    BackendRow(
        name="flash_mask",
        prefill=("rope_write_kv", "gather_kv", "masked_attention"),
        decode=("rope_write_kv", "paged_attention"),
        summary="prefill over gathered K and V, with an interval of keys per row",
    ),
    BackendRow(
        name="flash",
        prefill=("rope_write_kv", "gather_kv", "masked_attention"),
        decode=("rope_write_kv", "paged_attention"),
        summary="prefill over gathered K and V, causal",
        refuses=MappingProxyType(
            {
                "mask_offsets_on_prefill": "flash-attention libraries take no interval of keys "
                "per row; select flash_mask or append"
            }
        ),
    ),
)

BACKENDS: Mapping[str, BackendRow] = MappingProxyType({row.name: row for row in _ROWS})
#: The names of the backends, in the order in which `auto` tries them.
BACKEND_NAMES: tuple[str, ...] = tuple(BACKENDS)


def require_features(features: Iterable[str], *, op: str) -> frozenset[str]:
    """The features as a set; raises `UnknownNameError` for one that is not in `FEATURES`."""
    asked = tuple(features)
    for feature in asked:
        if feature not in FEATURES:
            raise unknown_name(op, "features", feature, FEATURES)
    return frozenset(asked)


def refusals(row: BackendRow, features: Iterable[str]) -> list[str]:
    """Why a backend does not serve these features; empty when it does."""
    asked = set(features)
    return [f"no {name}: {reason}" for name, reason in row.refuses.items() if name in asked]


def refuse_unserved(row: BackendRow, features: Iterable[str]) -> None:
    """Raise `UnsupportedError` naming the first feature that a backend does not serve."""
    asked = set(features)
    for feature, reason in row.refuses.items():
        if feature in asked:
            raise UnsupportedError(
                f"{row.name}.forward_mixed",
                feature,
                expected=f"a batch without {feature}",
                got=f"one with it: {reason}",
            )


def markdown_table() -> str:
    """The feature table, as the documentation shows it."""
    head = ["backend", "prefill rows", "decode rows", *(f.replace("_", " ") for f in FEATURES)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in BACKENDS.values():
        cells = [f"`{row.name}`", _ops(row.prefill), _ops(row.decode)]
        cells += ["refused" if feature in row.refuses else "yes" for feature in FEATURES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ops(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
