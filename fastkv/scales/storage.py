# SPDX-License-Identifier: Apache-2.0
"""What the files of static scales share: whole writes, and reads that name the file at fault."""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from fastkv import arrays
from fastkv.errors import ContractError, ScaleError, ScaleWarning
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


def bundle(op: str, file: str, layer: int, named: dict[str, Any]) -> StaticScales:
    """A bundle of the fields that a file holds for a layer."""
    unknown = named.keys() - set(FIELDS)
    absent = [name for name in FIELDS[:4] if name not in named]
    if unknown or absent:
        raise ScaleError(
            op,
            f"layers.{layer}",
            expected=f"the fields {', '.join(FIELDS[:4])} and perhaps k_zp, v_zp",
            got=f"{_faults('unknown', sorted(unknown)) or _faults('no', absent)} in {file}",
        )
    with _named(op, file, partial("layers.{}.{}".format, layer), f"layer {layer}"):
        return StaticScales(**named)


def _faults(what: str, names: list[str]) -> str:
    return f"{what} {', '.join(names)}" if names else ""


def validated(
    op: str,
    file: str,
    bundles: dict[int, StaticScales],
    spec: "CacheSpec | None",
    key: Callable[[int, str], str] = "layers.{}.{}".format,
) -> dict[int, StaticScales]:
    """The bundles in the order of their layers; with a spec, validated and remarked on.

    Args:
        op: names the caller in errors.
        file: that the bundles were read from, for errors.
        bundles: of each layer.
        spec: of the cache; None validates nothing.
        key: from a layer and a field to the file's key, for errors.
    """
    if spec is not None:
        for layer, scales in bundles.items():
            with _named(op, file, partial(key, layer), f"layer {layer}"):
                remarks = scales.validate(spec, layer)
            for remark in remarks:
                # Points at the caller of the function that loads.
                warnings.warn(f"layer {layer}: {remark}", ScaleWarning, stacklevel=3)
    return dict(sorted(bundles.items()))


@contextmanager
def _named(op: str, file: str, key: Callable[[str], str], layer: str) -> Iterator[None]:
    """Give errors about a bundle the names of the file that it was read from."""
    try:
        yield
    except ContractError as error:
        field = re.match(r"(?:static\.)?([kv]_\w+)", error.argument)
        named = layer if field is None else key(field[1]) + error.argument[field.end() :]
        error.op, error.argument = op, named
        error.got = f"{error.got} in {file}"
        raise
