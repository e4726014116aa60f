# SPDX-License-Identifier: Apache-2.0
"""The kernels that ops run on, and what each can: a table that selection reads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from fastkv.errors import ContractError
from fastkv.spec import CacheSpec


@dataclass(frozen=True, slots=True)
class Device:
    """Where tensors live.

    Attributes:
        kind: `cpu` or `cuda`.
        sm: compute capability of a GPU as one number: 90 for 9.0; None on a CPU.
    """

    kind: str
    sm: int | None = None

    @classmethod
    def of(cls, device: "Device | str") -> "Device":
        """From `"cpu"` or `"cuda:90"`; a `Device` comes back as it is."""
        if isinstance(device, Device):
            return device
        kind, _, sm = str(device).partition(":")
        sm = sm.removeprefix("sm_")
        if (kind == "cpu" and not sm) or (kind == "cuda" and sm.isdecimal() and int(sm) >= 10):
            return cls(kind, int(sm) if sm else None)
        raise ContractError(
            "select_backend", "device", expected="'cpu' or 'cuda:90' (9.0)", got=repr(device)
        )

    def __str__(self) -> str:
        return self.kind if self.sm is None else f"{self.kind} (sm_{self.sm})"


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of the ops.

    Attributes:
        name: for people and for `Choice.kernel`.
        kind: kind of device it runs on.
        min_sm: least compute capability, 0 for a CPU.
        min_sm_by_storage: storage dtypes that need more than `min_sm`.
        head_dims: head dims it serves; None: all.
        page_sizes: page sizes it serves; None: all.
        groups: query heads a KV head that it serves; None: all.
        storage: storage dtypes it serves; None: all.
    """

    name: str
    kind: str
    min_sm: int = 0
    min_sm_by_storage: Mapping[str, int] = field(default_factory=dict)
    head_dims: tuple[int, ...] | None = None
    page_sizes: tuple[int, ...] | None = None
    groups: range | None = None
    storage: tuple[str, ...] | None = None


KERNELS: Mapping[str, Kernels] = MappingProxyType(
    {
        "reference": Kernels(name="reference", kind="cpu"),
        "cuda": Kernels(
            name="cuda",
            kind="cuda",
            min_sm=80,
            min_sm_by_storage=MappingProxyType({"float8_e4m3fn": 89}),
            head_dims=(64, 96, 128, 256),
            page_sizes=(16, 32, 64, 128),
            groups=range(1, 17),
            storage=("bfloat16", "float16", "int8", "uint8", "float8_e4m3fn"),
        ),
    }
)


class Lack(NamedTuple):
    """One thing about a cache or its device that a row does not serve.

    Attributes:
        argument: what is at fault: `device`, a field of `CacheSpec`, or the query heads.
        expected: what the row serves.
        got: what it was asked to.
        reason: both in one sentence, as selection puts it.
    """

    argument: str
    expected: str
    got: str
    reason: str


def lacks(
    row: Kernels,
    device: Device,
    *,
    head_dim: int | None = None,
    page_size: int | None = None,
    storage: Iterable[str] = (),
    group: int | None = None,
) -> list[Lack]:
    """Why a row does not serve a cache; empty when it does. None is not asked about.

    Args:
        row: the kernels.
        device: where the tensors live.
        head_dim: D.
        page_size: P.
        storage: dtypes of the K and V tensors.
        group: query heads a KV head.
    """
    sm = device.sm or 0
    found = [_too_old(device, row.min_sm, "")] if sm < row.min_sm else []
    for argument, name, value, served in (
        ("head_dim", "head dim", head_dim, row.head_dims),
        ("page_size", "page size", page_size, row.page_sizes),
    ):
        if value is not None and served is not None and value not in served:
            known = ", ".join(map(str, served))
            reason = f"{name} {value} is none of {known}"
            found.append(Lack(argument, f"one of {known}", f"{value}", reason))
    if group is not None and row.groups is not None and group not in row.groups:
        span = f"{row.groups[0]} to {row.groups[-1]}"
        reason = f"{group} query heads a KV head are outside {span}"
        found.append(Lack("query heads a KV head", span, f"{group}", reason))
    for dtype in dict.fromkeys(storage):
        if row.storage is not None and dtype not in row.storage:
            served_dtypes = f"one of {', '.join(row.storage)}"
            found.append(Lack("dtype", served_dtypes, dtype, f"no {dtype} cache"))
        elif sm < (least := row.min_sm_by_storage.get(dtype, 0)):
            found.append(_too_old(device, least, f"{dtype} "))
    return found


def kernel_refusals(
    kernels: Mapping[str, Kernels],
    spec: CacheSpec,
    device: Device,
    num_query_heads: int | None = None,
) -> tuple[Kernels | None, list[str]]:
    """The kernels for a device, and why they cannot serve a spec (empty when they can)."""
    row = next((row for row in kernels.values() if row.kind == device.kind), None)
    if row is None:
        return None, [f"no kernels for a {device.kind} device"]
    found = lacks(
        row,
        device,
        head_dim=spec.head_dim,
        page_size=spec.page_size,
        storage=[spec.storage_dtype(i) for i in range(spec.num_layers)],
        group=None if num_query_heads is None else num_query_heads // spec.num_kv_heads,
    )
    return row, [lack.reason for lack in found]


def _too_old(device: Device, least: int, what: str) -> Lack:
    expected = f"sm_{least} or newer"
    return Lack("device", expected, str(device), f"{what}needs {expected}, the device is {device}")


def markdown_table() -> str:
    """The table of kernels, as the documentation shows it."""
    shapes = ("head dims", "page sizes", "query heads a KV head")
    head = ("kernels", "device", *shapes, "stored dtypes")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in KERNELS.values():
        cells = (
            f"`{row.name}`",
            f"sm_{row.min_sm} or newer" if row.min_sm else row.kind,
            _list(row.head_dims),
            _list(row.page_sizes),
            f"{row.groups[0]} to {row.groups[-1]}" if row.groups else "any",
            _list(None if row.storage is None else [_stored(row, name) for name in row.storage]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _list(values: Iterable[object] | None) -> str:
    return "any" if values is None else ", ".join(map(str, values))


def _stored(row: Kernels, dtype: str) -> str:
    least = row.min_sm_by_storage.get(dtype)
    return dtype if least is None else f"{dtype} (from sm_{least})"
