# SPDX-License-Identifier: Apache-2.0
"""From an engine's flat cache list and its layer to one layer's tensors."""

from collections.abc import Sequence
from typing import Any

from fastkv.cache import LayerCache
from fastkv.contracts.presence import refuse_tensor, require_paged, require_static, require_tensor
from fastkv.errors import ContractError, LayerIndexError, SpecMismatchError, SurplusTensorError
from fastkv.quant import QuantSpec, QuantType, quant_spec
from fastkv.scales import StaticScales
from fastkv.spec import CacheSpec

_OP = "resolve"

#: Attributes of an engine's layer that carry static scales -> field of `StaticScales`.
LAYER_SCALES = {
    "cache_k_scale": "k_quant",
    "cache_k_out_scale": "k_dequant",
    "cache_v_scale": "v_quant",
    "cache_v_out_scale": "v_dequant",
}
#: The same for zero points.
LAYER_ZERO_POINTS = {"cache_k_zp": "k_zp", "cache_v_zp": "v_zp"}
#: Attribute that carries a ready `StaticScales` instead.
LAYER_BUNDLE = "static_scales"


def resolve(caches: Sequence[Any], layer: Any, spec: CacheSpec) -> LayerCache:
    """The tensors of one layer.

    Works by index arithmetic and attributes only and never looks inside a tensor, so sentinels
    do in a test.

    Args:
        caches: the flat list, `spec.tensors_per_layer` entries a layer: K, V and, for a dynamic
            format, K scales and V scales.
        layer: has `layer_id`, and may have `cache_quant_type_str` (absent means `none`) and, for
            a static format, either `static_scales` (a `StaticScales`) or `cache_k_scale`,
            `cache_k_out_scale`, `cache_v_scale`, `cache_v_out_scale`, `cache_k_zp`, `cache_v_zp`.
        spec: what `caches` holds.

    Raises:
        LayerIndexError: `layer_id` is absent or outside the spec.
        UnknownNameError: a format that nobody knows.
        SpecMismatchError: the layer's format is not the spec's, or the list's length does not fit.
        MissingTensorError: a cache tensor, scale or zero point that the format requires is None.
        SurplusTensorError: scales or zero points on a format without them. The static scale
            attributes on the layer of a dynamic format are legal, since engines create and never
            fill them; they are not read.
    """
    layer_id = _layer_id(layer, spec)
    quant = spec.layer_quant(layer_id, op=_OP)
    _require_same_format(layer, quant)
    if len(caches) != spec.num_tensors:
        raise SpecMismatchError(
            _OP,
            "caches",
            format=quant.name.value,
            expected=f"{spec.num_tensors} tensors for {spec.num_layers} layers",
            got=str(len(caches)),
        )
    first = spec.first_index(layer_id)
    names = ("k", "v", "k_scale", "v_scale")[: quant.tensors_per_layer]
    found = dict(zip(names, caches[first : first + quant.tensors_per_layer], strict=True))
    at = {
        f"caches[{first + i}], layer {layer_id}'s {n}": t for i, (n, t) in enumerate(found.items())
    }
    require_paged(_OP, at, quant)
    return LayerCache(spec, layer_id, **found, static=_static(layer, quant))


def _layer_id(layer: Any, spec: CacheSpec) -> int:
    layer_id = getattr(layer, "layer_id", None)
    if layer_id is None:
        raise LayerIndexError(
            _OP, "layer.layer_id", expected=f"0 to {spec.num_layers - 1}", got="no such attribute"
        )
    spec.layer_quant(layer_id, op=_OP)
    return int(layer_id)


def _require_same_format(layer: Any, quant: QuantSpec) -> None:
    argument = "layer.cache_quant_type_str"
    name = getattr(layer, "cache_quant_type_str", None)
    given = quant_spec(QuantType.NONE if name is None else name, op=_OP, argument=argument)
    if given is not quant:
        raise SpecMismatchError(
            _OP,
            argument,
            format=given.name.value,
            expected=f"{quant.name.value}, as the spec says for this layer",
            got=given.name.value if name is not None else "no attribute, which means none",
        )


def _static(layer: Any, quant: QuantSpec) -> StaticScales | None:
    bundle = getattr(layer, LAYER_BUNDLE, None)
    if bundle is not None and not isinstance(bundle, StaticScales):
        raise ContractError(
            _OP,
            f"layer.{LAYER_BUNDLE}",
            format=quant.name.value,
            expected="a StaticScales or None",
            got=type(bundle).__name__,
        )
    scales = {name: getattr(layer, name, None) for name in LAYER_SCALES}
    zero_points = {name: getattr(layer, name, None) for name in LAYER_ZERO_POINTS}
    if not quant.needs_zp:
        for name, tensor in zero_points.items():
            refuse_tensor(_OP, f"layer.{name}", tensor, "the format has no zero points", quant)
    if not quant.needs_static:
        _refuse_scales(bundle, scales, quant)
        return None
    if bundle is None:
        return _bundle_from_attributes(scales | zero_points, quant)
    doubled = [name for name, tensor in (scales | zero_points).items() if tensor is not None]
    if doubled:
        raise SurplusTensorError(
            _OP,
            f"layer.{doubled[0]}",
            format=quant.name.value,
            expected=f"None beside layer.{LAYER_BUNDLE}",
            got="both: which one counts?",
        )
    require_static(_OP, f"layer.{LAYER_BUNDLE}", bundle, quant)
    return bundle


def _refuse_scales(bundle: Any, scales: dict[str, Any], quant: QuantSpec) -> None:
    refuse_tensor(_OP, f"layer.{LAYER_BUNDLE}", bundle, "the format takes no static scales", quant)
    if quant.needs_paged_scales:
        return  # the one legal surplus: engines create these on every layer and never fill them
    for name, tensor in scales.items():
        refuse_tensor(_OP, f"layer.{name}", tensor, "the format takes no scales", quant)


def _bundle_from_attributes(tensors: dict[str, Any], quant: QuantSpec) -> StaticScales:
    fields = LAYER_SCALES | LAYER_ZERO_POINTS
    for name, tensor in tensors.items():
        if fields[name] in quant.static_fields:
            require_tensor(_OP, f"layer.{name}", tensor, "a tensor [Hkv] or [Hkv, D]", quant)
    return StaticScales(**{fields[name]: tensor for name, tensor in tensors.items()})
