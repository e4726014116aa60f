# SPDX-License-Identifier: Apache-2.0
"""Static scales in files: fastkv's safetensors, FastDeploy's JSON, checkpoint keys.

A checkpoint holds, per layer and side, `activation_scale`: the observed amax (symmetric formats;
`quant = bound / amax`, `dequant = amax / bound`) or the step (a format with zero points;
`quant = 1 / step`, `dequant = step`), and `activation_zero_point` in quantized units. FastDeploy's
`kv_cache_scale.json` has the same keys with amax / 448, whatever the format's bound, since its
loader multiplies by 448. One number per pair of multipliers: a pair that is not inverse cannot be
kept in these two, and is refused.
"""

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.errors import MissingTensorError, ScaleError, ScaleWarning, UnsupportedError
from fastkv.quant import QuantSpec, quant_spec
from fastkv.scales.bundle import FIELDS, StaticScales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastkv.spec import CacheSpec

#: Layer id -> bundle.
ScalesByLayer = Mapping[int, StaticScales]
PathLike = str | os.PathLike[str]

_VERSION = "1"
_JSON_BOUND = 448.0
_INVERSE_TOLERANCE = 1e-3


def save_scales(path: PathLike, scales: ScalesByLayer) -> None:
    """Write bundles as safetensors: `layers.{id}.{field}`, dtypes kept.

    Args:
        path: the file to write.
        scales: bundle of each layer, on the CPU, any library.
    """
    from safetensors.numpy import save_file

    tensors = {
        f"layers.{layer}.{name}": _host(getattr(bundle, name))
        for layer, bundle in scales.items()
        for name in FIELDS
        if getattr(bundle, name) is not None
    }
    save_file(tensors, path, metadata={"format": "fastkv.static_scales", "version": _VERSION})


def load_scales(path: PathLike, spec: "CacheSpec | None" = None) -> dict[int, StaticScales]:
    """Read what `save_scales` wrote, as NumPy arrays.

    Args:
        path: the file.
        spec: validates each bundle against its layer, remarks as `ScaleWarning`.

    Raises:
        ScaleError: the file is no such file, or a value no op can use.
        ShapeError, MissingTensorError, SurplusTensorError: with `spec`, what does not fit it.
    """
    from safetensors import safe_open

    fields: dict[int, dict[str, Any]] = {}
    with safe_open(path, framework="numpy") as file:
        found = (file.metadata() or {}).get("format")
        if found != "fastkv.static_scales":
            raise ScaleError(
                "load_scales",
                str(path),
                expected="a safetensors file with format fastkv.static_scales in its metadata",
                got=repr(found),
            )
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            _, layer, name = key.split(".")
            fields.setdefault(int(layer), {})[name] = file.get_tensor(key)
    bundles = {layer: _bundle("load_scales", layer, named) for layer, named in fields.items()}
    return _validated(bundles, spec)


def save_checkpoint(path: PathLike, scales: ScalesByLayer, spec: "CacheSpec", prefix: str) -> None:
    """Write a safetensors file with checkpoint keys.

    Args:
        path: the file to write.
        scales: bundle of each layer.
        spec: names each layer's format.
        prefix: the layers' module path, with `{layer}` in it, such as
            `model.layers.{layer}.self_attn`.

    Raises:
        ScaleError: a pair of multipliers that is not inverse.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray[Any]] = {}
    for layer, bundle in scales.items():
        row = _require_static("save_checkpoint", spec, layer)
        for side in ("k", "v"):
            scale = _activation_scale("save_checkpoint", bundle, side, row)
            tensors[_key(prefix, layer, side, "scale")] = scale
            if row.needs_zp:
                zero_point = _host(getattr(bundle, f"{side}_zp"))
                tensors[_key(prefix, layer, side, "zero_point")] = zero_point
    save_file(tensors, path)


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
        ScaleError, ShapeError: what `StaticScales.validate` refuses.
    """
    from safetensors import safe_open

    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    wanted = dict.fromkeys(_checkpoint_keys(spec, prefix))
    tensors: dict[str, Any] = {}
    for each in paths:
        with safe_open(each, framework="numpy") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys() if key in wanted}  # noqa: SIM118
    return _from_keys("load_checkpoint", tensors, spec, prefix, factor=1.0)


def save_fastdeploy_json(
    path: PathLike,
    scales: ScalesByLayer,
    spec: "CacheSpec",
    prefix: str = "ernie.layers.{layer}.self_attn",
) -> None:
    """Write FastDeploy's `kv_cache_scale.json`: amax / 448 under the checkpoint's keys.

    FastDeploy itself reads this file for `cache_fp8` only.

    Raises:
        UnsupportedError: a layer's format has zero points, for which the file has no place.
        ScaleError: a pair of multipliers that is not inverse.
    """
    values: dict[str, Any] = {}
    for layer, bundle in scales.items():
        row = _require_static("save_fastdeploy_json", spec, layer)
        _refuse_zero_points("save_fastdeploy_json", row)
        for side in ("k", "v"):
            amax = _activation_scale("save_fastdeploy_json", bundle, side, row)
            values[_key(prefix, layer, side, "scale")] = (amax / _JSON_BOUND).tolist()
    Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_fastdeploy_json(
    path: PathLike,
    spec: "CacheSpec",
    prefix: str = "ernie.layers.{layer}.self_attn",
) -> dict[int, StaticScales]:
    """Read FastDeploy's `kv_cache_scale.json`.

    Raises:
        UnsupportedError: a layer's format has zero points.
        MissingTensorError: a layer's key is absent.
        ScaleError, ShapeError: what `StaticScales.validate` refuses.
    """
    for layer in range(spec.num_layers):
        if spec.layer_quant(layer).needs_static:
            _refuse_zero_points("load_fastdeploy_json", spec.layer_quant(layer))
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    return _from_keys("load_fastdeploy_json", values, spec, prefix, factor=_JSON_BOUND)


def _key(prefix: str, layer: int, side: str, what: str) -> str:
    return f"{prefix.format(layer=layer)}.cache{side}_matmul.activation_{what}"


def _checkpoint_keys(spec: "CacheSpec", prefix: str) -> list[str]:
    kinds = ("scale", "zero_point")
    return [_key(prefix, i, s, k) for i in range(spec.num_layers) for s in "kv" for k in kinds]


def _host(array: Any) -> Any:
    import numpy as np

    from fastkv import arrays

    return np.ascontiguousarray(arrays.to_host(array))


def _require_static(op: str, spec: "CacheSpec", layer: int) -> QuantSpec:
    row = spec.layer_quant(layer, op=op)
    if not row.needs_static:
        raise UnsupportedError(
            op,
            f"scales[{layer}]",
            format=row.name.value,
            expected="a layer with static scales",
            got=row.name.value,
        )
    return row


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


def _activation_scale(op: str, bundle: StaticScales, side: str, row: QuantSpec) -> "NDArray[Any]":
    """The one number a checkpoint keeps of a pair: amax, or the step of a format with zp."""
    import numpy as np

    quant = _host(getattr(bundle, f"{side}_quant")).astype(np.float32)
    dequant = _host(getattr(bundle, f"{side}_dequant")).astype(np.float32)
    if quant.shape != dequant.shape or np.abs(quant * dequant - 1).max() > _INVERSE_TOLERANCE:
        raise ScaleError(
            op,
            f"{side}_quant, {side}_dequant",
            format=row.name.value,
            expected="an inverse pair, which one number can keep",
            got="multipliers that are not inverse",
            hint="save_scales keeps both.",
        )
    return dequant if row.needs_zp else dequant * np.float32(row.bound)  # type: ignore[no-any-return]


def _from_keys(
    op: str, tensors: Mapping[str, Any], spec: "CacheSpec", prefix: str, *, factor: float
) -> dict[int, StaticScales]:
    bundles = {}
    for layer in range(spec.num_layers):
        row = spec.layer_quant(layer)
        if row.needs_static:
            named: dict[str, Any] = {}
            for side in ("k", "v"):
                named |= _side_from_keys(op, tensors, spec, (prefix, layer, side), factor)
            bundles[layer] = _bundle(op, layer, named)
    return _validated(bundles, spec)


def _side_from_keys(
    op: str,
    tensors: Mapping[str, Any],
    spec: "CacheSpec",
    where: tuple[str, int, str],
    factor: float,
) -> dict[str, Any]:
    import numpy as np

    row, side = quant_spec(spec.layer_quant(where[1])), where[2]

    def array(what: str) -> "NDArray[np.float32]":
        key = _key(*where, what)
        if key not in tensors:
            raise MissingTensorError(
                op, key, format=row.name.value, expected="a tensor in the file", got="no such key"
            )
        flat = np.asarray(tensors[key]).astype(np.float32).reshape(-1)
        per_channel = flat.size == spec.num_kv_heads * spec.head_dim
        return flat.reshape(spec.num_kv_heads, -1) if per_channel else flat

    scale = array("scale") * np.float32(factor)
    dequant = scale if row.needs_zp else scale / np.float32(row.bound)
    with np.errstate(divide="ignore"):  # a scale of 0 is refused by its name afterwards
        named = {f"{side}_quant": 1 / dequant, f"{side}_dequant": dequant}
    return named | ({f"{side}_zp": array("zero_point")} if row.needs_zp else {})


def _bundle(op: str, layer: int, named: dict[str, Any]) -> StaticScales:
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


def _validated(
    bundles: dict[int, StaticScales], spec: "CacheSpec | None"
) -> dict[int, StaticScales]:
    if spec is not None:
        for layer, bundle in bundles.items():
            for remark in bundle.validate(spec, layer):
                warnings.warn(f"layer {layer}: {remark}", ScaleWarning, stacklevel=3)
    return dict(sorted(bundles.items()))
