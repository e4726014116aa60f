# SPDX-License-Identifier: Apache-2.0
"""The kernels that ops run on, and what each can: a table that selection reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

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
        unavailable: why this build does not have it; None when it does.
        min_sm: least compute capability, 0 for a CPU.
        min_sm_by_storage: storage dtypes that need more than `min_sm`.
        head_dims: head dims it serves; None: all.
        storage: storage dtypes it serves; None: all.
    """

    name: str
    kind: str
    unavailable: str | None = None
    min_sm: int = 0
    min_sm_by_storage: Mapping[str, int] = field(default_factory=dict)
    head_dims: tuple[int, ...] | None = None
    storage: tuple[str, ...] | None = None


KERNELS: Mapping[str, Kernels] = MappingProxyType(
    {
        "reference": Kernels(name="reference", kind="cpu"),
        "cuda": Kernels(
            name="cuda",
            kind="cuda",
            unavailable="this version has no CUDA kernels",
            min_sm=80,
            min_sm_by_storage=MappingProxyType({"float8_e4m3fn": 89}),
            head_dims=(64, 96, 128, 256),
            storage=("bfloat16", "float16", "int8", "uint8", "float8_e4m3fn"),
        ),
    }
)


def kernel_refusals(
    kernels: Mapping[str, Kernels], spec: CacheSpec, device: Device
) -> tuple[str, list[str]]:
    """The kernels for a device, and why they cannot serve a spec (empty when they can)."""
    row = next((row for row in kernels.values() if row.kind == device.kind), None)
    if row is None:
        return "", [f"no kernels for a {device.kind} device"]
    return row.name, [row.unavailable] if row.unavailable else _lacks(row, spec, device)


def _lacks(row: Kernels, spec: CacheSpec, device: Device) -> list[str]:
    reasons = []
    sm = device.sm or 0
    if sm < row.min_sm:
        reasons.append(f"needs sm_{row.min_sm} or newer, the device is {device}")
    if row.head_dims is not None and spec.head_dim not in row.head_dims:
        known = ", ".join(map(str, row.head_dims))
        reasons.append(f"head dim {spec.head_dim} is none of {known}")
    dtypes = dict.fromkeys(spec.storage_dtype(i) for i in range(spec.num_layers))
    for dtype in dtypes:
        if row.storage is not None and dtype not in row.storage:
            reasons.append(f"no {dtype} cache")
        elif sm < (least := row.min_sm_by_storage.get(dtype, 0)):
            reasons.append(f"{dtype} needs sm_{least} or newer, the device is {device}")
    return reasons
