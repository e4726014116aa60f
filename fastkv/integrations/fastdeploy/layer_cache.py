# SPDX-License-Identifier: Apache-2.0
"""From the tensors that an op of the engine is given to a `LayerCache`."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from fastkv.cache import LayerCache
from fastkv.contracts.presence import refuse_tensor, require_tensor
from fastkv.dtypes import FLOATS
from fastkv.errors import ShapeError
from fastkv.integrations.fastdeploy.tensors import described, require_dtype
from fastkv.quant import QuantSpec, quant_spec
from fastkv.scales import StaticScales
from fastkv.spec import CacheSpec

# Fields of `StaticScales` in the order in which the engine's ops take them.
_FIELDS = ("k_quant", "v_quant", "k_dequant", "v_dequant", "k_zp", "v_zp")
_PAGED = ("k_quant", "v_quant")  # whose places the paged scales of a dynamic format take


def layer_cache(
    op: str, key_cache: Any, value_cache: Any, scales: Mapping[str, Any], cache_quant_type: Any
) -> LayerCache:
    """One layer's cache, with the presence of every tensor checked.

    Args:
        op: names the caller in errors.
        key_cache: `[N, Hkv, P, D_storage]`.
        value_cache: as `key_cache`.
        scales: the engine's six scale arguments by its names, in its order: quant multipliers of
            K and V, dequant multipliers, zero points. A dynamic format has its paged dequant
            multipliers `[N, Hkv, P]` in the places of the quant multipliers; its dequant
            multipliers are created and never filled, and are not read.
        cache_quant_type: the format's name.

    Raises:
        UnknownNameError: a format that nobody knows.
        MissingTensorError: a cache tensor, scale or zero point that the format needs is None.
        SurplusTensorError: one that the format has no use for.
        ShapeError, DtypeError: a cache that is not of four dimensions, or of a wrong dtype.
    """
    quant = quant_spec(cache_quant_type, op=op, argument="cache_quant_type")
    given = dict(zip(_FIELDS, scales.items(), strict=True))
    _check_scales(op, given, quant)
    shape, dtype = _described_cache(op, key_cache, value_cache, quant)
    scale_dtype = "float32"
    if quant.needs_paged_scales:
        name, tensor = given["k_quant"]
        info = described(op, name, tensor, "dequant multipliers", quant.name.value)
        require_dtype(op, name, info, FLOATS, quant.name.value)
        scale_dtype = info.dtype
    _, heads, page_size, width = shape
    spec = _spec(heads, width * quant.elements_per_item, page_size, quant, dtype, scale_dtype)
    tensors = {field: tensor for field, (_, tensor) in given.items()}
    if quant.needs_paged_scales:
        return LayerCache(spec, 0, key_cache, value_cache, tensors["k_quant"], tensors["v_quant"])
    static = (
        StaticScales(**{f: tensors[f] for f in quant.static_fields}) if quant.needs_static else None
    )
    return LayerCache(spec, 0, key_cache, value_cache, static=static)


def names_of(scales: Mapping[str, Any]) -> dict[str, str]:
    """Names of a cache's tensors in fastkv -> in the engine; `scales` as in `layer_cache`."""
    names = {"cache.k": "key_cache", "cache.v": "value_cache"}
    for field, name in zip(_FIELDS, scales, strict=True):
        names[f"cache.static.{field}"] = name
        if field in _PAGED:
            names[f"cache.{field[0]}_scale"] = name
    return names


def _check_scales(op: str, given: Mapping[str, tuple[str, Any]], quant: QuantSpec) -> None:
    for field, (name, tensor) in given.items():
        if quant.needs_paged_scales and field in _PAGED:
            expected = "paged dequant multipliers [N, Hkv, P]"
            require_tensor(op, name, tensor, expected, quant)
        elif quant.needs_static and field in quant.static_fields:
            layouts = " or ".join(f"per {layout}" for layout in quant.granularities)
            require_tensor(op, name, tensor, f"a tensor, {layouts}", quant)
        elif field.endswith("_zp"):
            refuse_tensor(op, name, tensor, "the format has no zero points", quant)
        elif not quant.needs_paged_scales:
            refuse_tensor(op, name, tensor, "the format has no scales", quant)


def _described_cache(
    op: str, key_cache: Any, value_cache: Any, quant: QuantSpec
) -> tuple[tuple[int, ...], str]:
    """Shape of the cache tensors, and the dtype that one without quantization stores."""
    expected = "a cache tensor [N, Hkv, P, D_storage]"
    require_tensor(op, "value_cache", value_cache, expected, quant)
    info = described(op, "key_cache", key_cache, expected, quant.name.value)
    if len(info.shape) != 4 or 0 in info.shape[1:]:
        raise ShapeError(
            op,
            "key_cache",
            format=quant.name.value,
            expected="[N, Hkv, P, D_storage]",
            got=str(list(info.shape)),
            hint="Is it the scales of another layer, or a cache of MLA, which is not served?",
        )
    if quant.storage is not None:
        return info.shape, "bfloat16"
    require_dtype(op, "key_cache", info, FLOATS, quant.name.value)
    return info.shape, info.dtype


@cache
def _spec(
    heads: int, head_dim: int, page_size: int, quant: QuantSpec, dtype: str, scale_dtype: str
) -> CacheSpec:
    return CacheSpec(1, heads, head_dim, page_size, quant.name, dtype, scale_dtype)
