# SPDX-License-Identifier: Apache-2.0
"""The files that calibrated scales are written to, and what is checked before anything is run."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from fastkv.calibrate.errors import OP
from fastkv.errors import ContractError, UnsupportedError, unknown_name
from fastkv.quant import QuantSpec
from fastkv.scales import save_checkpoint, save_fastdeploy_json, save_scales

if TYPE_CHECKING:
    from fastkv.scales.storage import ScalesByLayer
    from fastkv.spec import CacheSpec

_LAYER = "{layer}"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of file.

    Attributes:
        prefix: of the layers' keys by default; None where the keys have no prefix.
        zero_points: whether the file has a place for them.
        save: writes it whole or not at all: path, scales, spec, prefix.
    """

    prefix: str | None
    zero_points: bool
    save: "Callable[[Path, ScalesByLayer, CacheSpec, str], None]"


def _save_native(path: Path, scales: "ScalesByLayer", spec: "CacheSpec", prefix: str) -> None:
    for layer, bundle in scales.items():
        bundle.validate(spec, layer)
    save_scales(path, scales)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "safetensors": Kind(None, True, _save_native),
        "fastdeploy": Kind("ernie.layers.{layer}.self_attn", False, save_fastdeploy_json),
        "checkpoint": Kind("model.layers.{layer}.self_attn", True, save_checkpoint),
    }
)


@dataclass(frozen=True, slots=True)
class Output:
    """Where and how the scales are written.

    Attributes:
        path: the file.
        kind: one of `KINDS`.
        prefix: of the layers' keys, with `{layer}` in it; None takes the kind's own.
        force: an existing file is replaced.
    """

    path: Path
    kind: str = "safetensors"
    prefix: str | None = None
    force: bool = False

    def check(self, row: QuantSpec) -> None:
        """Raise what writing would raise, before a long job.

        Raises:
            UnknownNameError: of the kind.
            ContractError: a prefix without `{layer}` or where there is none, a file that exists.
            UnsupportedError: zero points that the file has no place for.
            OSError: no such folder, or nothing can be written there.
        """
        if self.kind not in KINDS:
            raise unknown_name(OP, "--write", self.kind, KINDS)
        kind = KINDS[self.kind]
        if row.needs_zp and not kind.zero_points:
            raise UnsupportedError(
                OP,
                "--write",
                format=row.name.value,
                expected="a file with a place for zero points: safetensors or checkpoint",
                got=self.kind,
            )
        self._check_prefix(kind)
        require_place(self.path, "--output", force=self.force)

    def _check_prefix(self, kind: Kind) -> None:
        if self.prefix is None:
            return
        if kind.prefix is None:
            expected = "no prefix for fastkv's own files"
        elif _LAYER not in self.prefix:
            expected = f"a module path with {_LAYER} in it"
        else:
            return
        raise ContractError(OP, "--prefix", expected=expected, got=repr(self.prefix))

    def save(self, scales: "ScalesByLayer", spec: "CacheSpec") -> None:
        """Write the file whole or not at all; every bundle is validated before."""
        kind = KINDS[self.kind]
        kind.save(self.path, scales, spec, self.prefix or kind.prefix or "")


def require_place(path: Path, argument: str, *, force: bool) -> None:
    """Raise unless a file can be written there; one that exists only with `force`."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r} to write {path.name} to")
    if path.is_dir():
        raise IsADirectoryError(f"{argument} {str(path)!r} is a folder")
    if path.exists() and not force:
        raise ContractError(
            OP,
            argument,
            expected="a file that does not exist",
            got=str(path),
            hint="--force replaces it.",
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"nothing can be written to the folder {str(folder)!r}")
