# SPDX-License-Identifier: Apache-2.0
"""What the files of static scales share: whole writes, and reads that name the file at fault."""

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from fastkv import arrays
from fastkv.errors import ScaleError, ScaleWarning
from fastkv.scales.bundle import FIELDS, StaticScales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastkv.spec import CacheSpec

#: Layer id -> bundle.
ScalesByLayer = Mapping[int, StaticScales]
PathLike = str | os.PathLike[str]


def host(array: Any) -> "NDArray[Any]":
    """A contiguous NumPy array of a CPU tensor."""
    import numpy as np

    return np.ascontiguousarray(arrays.to_host(array))


def write(path: PathLike, content: bytes) -> None:
    """Write a file whole or not at all: a reader, or a crash, never meets half of it."""
    target = Path(os.path.realpath(path))  # through a link, not over it
    temporary = target.with_name(f".{target.name}.{token_hex(8)}")
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_safetensors(
    path: PathLike, tensors: "Mapping[str, NDArray[Any]]", metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; the same content gives the same bytes.

    At most one entry of metadata: safetensors writes several in a random order.
    """
    from safetensors.numpy import save

    write(path, save(dict(tensors), metadata))


def read_safetensors(
    op: str, path: PathLike, wanted: Callable[[str], bool]
) -> "tuple[dict[str, str], dict[str, NDArray[Any]]]":
    """Metadata of a safetensors file, and those tensors whose names are wanted.

    Raises:
        ScaleError: the file is no safetensors file, or is cut short.
        OSError: there is no such file, or it cannot be read.
    """
    import ml_dtypes  # noqa: F401 - teaches NumPy the name of bfloat16
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118 - no mapping
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise unreadable(op, path, "a whole safetensors file", error) from error


def unreadable(op: str, path: PathLike, expected: str, error: object) -> ScaleError:
    """The error for a file that is not what it should be."""
    return ScaleError(op, os.fspath(path), expected=expected, got=str(error))


def bundle(op: str, layer: int, named: dict[str, Any]) -> StaticScales:
    """A bundle of the fields that a file holds for a layer."""
    unknown = named.keys() - set(FIELDS)
    absent = [name for name in FIELDS[:4] if name not in named]
    if unknown or absent:
        raise ScaleError(
            op,
            f"layers.{layer}",
            expected=f"the fields {', '.join(FIELDS[:4])} and perhaps k_zp, v_zp",
            got=f"unknown {', '.join(sorted(unknown))}" if unknown else f"no {', '.join(absent)}",
        )
    return StaticScales(**named)


def validated(
    bundles: dict[int, StaticScales], spec: "CacheSpec | None"
) -> dict[int, StaticScales]:
    """The bundles in the order of their layers; with a spec, validated and remarked on."""
    if spec is not None:
        for layer, scales in bundles.items():
            for remark in scales.validate(spec, layer):
                # Points at the caller of the function that loads.
                warnings.warn(f"layer {layer}: {remark}", ScaleWarning, stacklevel=3)
    return dict(sorted(bundles.items()))
