# SPDX-License-Identifier: Apache-2.0
"""Static scales in fastkv's own safetensors files, which keep every array as it is."""

import os
import re
from typing import TYPE_CHECKING, Any

from fastkv.errors import MissingTensorError, ScaleError
from fastkv.scales.bundle import FIELDS, StaticScales
from fastkv.scales.storage import (
    PathLike,
    ScalesByLayer,
    bundle,
    host,
    read_safetensors,
    validated,
    write_safetensors,
)

if TYPE_CHECKING:
    from fastkv.spec import CacheSpec

_FORMAT = "fastkv.static_scales.v1"
_KEY = re.compile(r"layers\.(0|[1-9][0-9]*)\.(\w+)", re.ASCII)


def save_scales(path: PathLike, scales: ScalesByLayer) -> None:
    """Write bundles as safetensors: `layers.{id}.{field}`, dtypes and shapes kept.

    Args:
        path: the file to write; it is replaced whole or, when this fails, left as it was.
        scales: bundle of each layer, on the CPU, any library.
    """
    tensors = {
        f"layers.{layer}.{name}": host(getattr(each, name))
        for layer, each in scales.items()
        for name in FIELDS
        if getattr(each, name) is not None
    }
    write_safetensors(path, tensors, {"format": _FORMAT})


def load_scales(path: PathLike, spec: "CacheSpec | None" = None) -> dict[int, StaticScales]:
    """Read what `save_scales` wrote, as NumPy arrays.

    Args:
        path: the file.
        spec: requires a bundle for each of its static layers, and validates each; remarks come
            as `ScaleWarning`.

    Raises:
        ScaleError: the file is no such file, or a value no op can use.
        ShapeError, MissingTensorError, SurplusTensorError: with `spec`, what does not fit it.
    """
    op = "load_scales"
    metadata, tensors = read_safetensors(op, path, lambda name: True)
    found = metadata.get("format")
    if found != _FORMAT:
        expected = f"a safetensors file with format {_FORMAT} in its metadata"
        raise ScaleError(op, os.fspath(path), expected=expected, got=repr(found))
    fields: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ScaleError(op, os.fspath(path), expected="keys layers.{id}.{field}", got=key)
        fields.setdefault(int(match[1]), {})[match[2]] = tensor
    file = os.fspath(path)
    bundles = {layer: bundle(op, file, layer, named) for layer, named in fields.items()}
    if spec is not None:
        _require_layers(op, path, bundles, spec)
    return validated(op, file, bundles, spec)


def _require_layers(op: str, path: PathLike, bundles: ScalesByLayer, spec: "CacheSpec") -> None:
    for layer in range(spec.num_layers):
        row = spec.layer_quant(layer)
        if row.needs_static and layer not in bundles:
            raise MissingTensorError(
                op,
                f"layers.{layer}",
                format=row.name.value,
                expected="static scales of every static layer",
                got=f"none in {os.fspath(path)}",
            )
