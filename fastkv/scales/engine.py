# SPDX-License-Identifier: Apache-2.0
"""Static scales in the files that FastDeploy reads: checkpoint keys, and `kv_cache_scale.json`.

A checkpoint holds, per layer and side, `activation_scale`: the observed amax (symmetric formats;
`quant = bound / amax`, `dequant = amax / bound`) or the step (a format with zero points;
`quant = 1 / step`, `dequant = step`), and `activation_zero_point` in quantized units; flat, as the
engine's parameters are. `kv_cache_scale.json` has the same keys with amax / 448, whatever the
format's bound, since its loader multiplies by 448. One number per pair of multipliers: a pair that
is not inverse cannot be kept in these two, and is refused.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.errors import (
    ContractError,
    MissingTensorError,
    ScaleError,
    ShapeError,
    UnsupportedError,
)
from fastkv.quant import Granularity, QuantSpec
from fastkv.scales.bundle import StaticScales
from fastkv.scales.storage import (
    PathLike,
    ScalesByLayer,
    host,
    read_safetensors,
    unreadable,
    validated,
    write,
    write_safetensors,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastkv.spec import CacheSpec

_JSON_BOUND = 448.0
_INVERSE_TOLERANCE = 1e-3
_LAYER = "{layer}"


def save_checkpoint(path: PathLike, scales: ScalesByLayer, spec: "CacheSpec", prefix: str) -> None:
    """Write a safetensors file with checkpoint keys.

    Args:
        path: the file to write; it is replaced whole or, when this fails, left as it was.
        scales: bundle of each layer, validated here.
        spec: names each layer's format.
        prefix: the layers' module path, with `{layer}` in it, such as
            `model.layers.{layer}.self_attn`.

    Raises:
        ScaleError: a pair of multipliers that is not inverse.
        ContractError: what `StaticScales.validate` refuses, or a prefix without `{layer}`.
    """
    op = "save_checkpoint"
    tensors: dict[str, NDArray[Any]] = {}
    for layer, bundle in scales.items():
        bundle.validate(spec, layer)
        row = spec.layer_quant(layer)
        for side in ("k", "v"):
            scale = _activation_scale(op, layer, bundle, side, row)
            tensors[_key(op, prefix, layer, side, "scale")] = scale
            if row.needs_zp:
                zero_point = host(getattr(bundle, f"{side}_zp")).reshape(-1)
                tensors[_key(op, prefix, layer, side, "zero_point")] = zero_point
    write_safetensors(path, tensors)


def load_checkpoint(
    path: PathLike | Iterable[PathLike], spec: "CacheSpec", prefix: str
) -> dict[int, StaticScales]:
    """Read the static scales of a checkpoint.

    Args:
        path: a safetensors file, or all the files of a sharded checkpoint.
        spec: the whole model's; layers of formats without static scales are skipped.
        prefix: see `save_checkpoint`.

    Raises:
        MissingTensorError: a key that the layer's format needs is in none of the files.
        ScaleError, ShapeError: values or sizes that no op can use, or a file that is none.
    """
    op = "load_checkpoint"
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    keys = {
        _key(op, prefix, layer, side, what)
        for layer in range(spec.num_layers)
        for side in "kv"
        for what in ("scale", "zero_point")
    }
    tensors: dict[str, Any] = {}
    for each in paths:
        tensors |= read_safetensors(op, each, keys.__contains__)[1]
    file = _File(op, ", ".join(os.fspath(each) for each in paths), tensors, prefix, factor=1.0)
    return validated(op, file.name, file.bundles(spec), spec, file.key)


def save_fastdeploy_json(
    path: PathLike,
    scales: ScalesByLayer,
    spec: "CacheSpec",
    prefix: str = "ernie.layers.{layer}.self_attn",
) -> None:
    """Write FastDeploy's `kv_cache_scale.json`: amax / 448 under the checkpoint's keys.

    FastDeploy itself reads this file for `cache_fp8` only.

    Args:
        path: the file to write; it is replaced whole or, when this fails, left as it was.
        scales: bundle of each layer, validated here.
        spec: names each layer's format.
        prefix: see `save_checkpoint`.

    Raises:
        UnsupportedError: a layer's format has zero points, for which the file has no place.
        ScaleError: a pair of multipliers that is not inverse.
        ContractError: as in `save_checkpoint`.
    """
    op = "save_fastdeploy_json"
    values: dict[str, Any] = {}
    for layer, bundle in scales.items():
        row = spec.layer_quant(layer, op=op)
        _refuse_zero_points(op, row)
        bundle.validate(spec, layer)
        for side in ("k", "v"):
            amax = _activation_scale(op, layer, bundle, side, row)
            values[_key(op, prefix, layer, side, "scale")] = (amax / _JSON_BOUND).tolist()
    write(path, (json.dumps(values, indent=2) + "\n").encode())


def load_fastdeploy_json(
    path: PathLike,
    spec: "CacheSpec",
    prefix: str = "ernie.layers.{layer}.self_attn",
) -> dict[int, StaticScales]:
    """Read FastDeploy's `kv_cache_scale.json`.

    Args:
        path: the file.
        spec: the whole model's; layers of formats without static scales are skipped.
        prefix: see `save_checkpoint`.

    Raises:
        UnsupportedError: a layer's format has zero points.
        MissingTensorError: a layer's key is absent.
        ScaleError, ShapeError: values or sizes that no op can use, or a file that is none.
    """
    op = "load_fastdeploy_json"
    for layer in range(spec.num_layers):
        _refuse_zero_points(op, spec.layer_quant(layer))
    expected = "a JSON object of activation scales"
    try:
        values = json.loads(Path(path).read_bytes())
    except ValueError as error:  # no JSON, or no UTF-8
        raise unreadable(op, path, expected, error) from error
    if not isinstance(values, dict):
        raise unreadable(op, path, expected, f"a {type(values).__name__}")
    file = _File(op, os.fspath(path), values, prefix, factor=_JSON_BOUND)
    return validated(op, file.name, file.bundles(spec), spec, file.key)


def _key(op: str, prefix: str, layer: int, side: str, what: str) -> str:
    if _LAYER not in prefix:
        # One key for all layers would give every layer the scales of one.
        expected = f"a module path with {_LAYER} in it"
        raise ContractError(op, "prefix", expected=expected, got=repr(prefix))
    return f"{prefix.replace(_LAYER, str(layer))}.cache{side}_matmul.activation_{what}"


def _refuse_zero_points(op: str, row: QuantSpec) -> None:
    if row.needs_zp:
        raise UnsupportedError(
            op,
            "spec.quant",
            format=row.name.value,
            expected="a format without zero points: kv_cache_scale.json has no place for them",
            got=row.name.value,
            hint="Use checkpoint keys or fastkv's safetensors.",
        )


def _activation_scale(
    op: str, layer: int, bundle: StaticScales, side: str, row: QuantSpec
) -> "NDArray[Any]":
    """What a checkpoint keeps of a pair, flat: amax, or the step of a format with zero points."""
    import numpy as np

    quant, dequant = (
        host(getattr(bundle, f"{side}_{name}")).astype(np.float32).reshape(-1)
        for name in ("quant", "dequant")
    )
    if quant.shape != dequant.shape or np.abs(quant * dequant - 1).max() > _INVERSE_TOLERANCE:
        raise ScaleError(
            op,
            f"scales[{layer}].{side}_quant, {side}_dequant",
            format=row.name.value,
            expected="an inverse pair, which one number can keep",
            got="multipliers that are not inverse",
            hint="save_scales keeps both.",
        )
    return dequant if row.needs_zp else dequant * np.float32(row.bound)


class _File:
    """What was read from the engine's files.

    Args:
        op: names the caller in errors.
        name: the files, for people.
        values: key -> array or list of numbers.
        prefix: see `save_checkpoint`.
        factor: turns the file's scale into amax or step.
    """

    def __init__(
        self, op: str, name: str, values: Mapping[str, Any], prefix: str, *, factor: float
    ) -> None:
        self.op, self.name, self.values, self.prefix = op, name, values, prefix
        self.factor = factor

    def key(self, layer: int, field: str) -> str:
        """The key that a field of a layer's bundle comes from."""
        what = "zero_point" if field.endswith("_zp") else "scale"
        return _key(self.op, self.prefix, layer, field[0], what)

    def bundles(self, spec: "CacheSpec") -> dict[int, StaticScales]:
        """The bundle of each static layer."""
        return {
            layer: StaticScales(**(self._side(spec, layer, "k") | self._side(spec, layer, "v")))
            for layer in range(spec.num_layers)
            if spec.layer_quant(layer).needs_static
        }

    def _side(self, spec: "CacheSpec", layer: int, side: str) -> "dict[str, NDArray[Any]]":
        import numpy as np

        row = spec.layer_quant(layer)
        key = _key(self.op, self.prefix, layer, side, "scale")
        with np.errstate(over="ignore"):
            scale = self._array(key, spec, row) * np.float32(self.factor)
        usable = np.isfinite(scale) & (scale > 0)
        if not usable.all():
            worst = tuple(np.argwhere(~usable)[0].tolist())
            raise ScaleError(
                self.op,
                key,
                format=row.name.value,
                expected="finite and > 0",
                got=f"{scale[worst]} at {list(worst)} in {self.name}",
                hint="A scale of 0 is one that was created and never filled."
                if scale[worst] == 0
                else "",
            )
        dequant = scale if row.needs_zp else scale / np.float32(row.bound)
        named = {f"{side}_quant": 1 / dequant, f"{side}_dequant": dequant}
        if row.needs_zp:
            key = _key(self.op, self.prefix, layer, side, "zero_point")
            named[f"{side}_zp"] = self._array(key, spec, row)
        return named

    def _array(self, key: str, spec: "CacheSpec", row: QuantSpec) -> "NDArray[np.float32]":
        """`[Hkv]` or `[Hkv, D]` float32 of one key, whatever its shape in the file."""
        import numpy as np

        if key not in self.values:
            raise MissingTensorError(
                self.op,
                key,
                format=row.name.value,
                expected="a tensor of this name",
                got=f"none in {self.name}",
            )
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold is named as infinite
                flat = np.asarray(self.values[key]).astype(np.float32).reshape(-1)
        except (TypeError, ValueError, OverflowError) as error:
            got = f"{error} in {self.name}"
            raise ScaleError(self.op, key, expected="numbers", got=got) from error
        heads, dim = spec.num_kv_heads, spec.head_dim
        shapes = {Granularity.HEAD: (heads,), Granularity.CHANNEL: (heads, dim)}
        for shape in (shapes[granularity] for granularity in row.granularities):
            if flat.size == np.prod(shape):
                return flat.reshape(shape)
        raise ShapeError(
            self.op,
            key,
            format=row.name.value,
            expected=" or ".join(f"{list(shapes[g])}, per {g}" for g in row.granularities),
            got=f"{flat.size} numbers in {self.name}",
        )
