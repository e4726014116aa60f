# SPDX-License-Identifier: Apache-2.0
"""From an engine's flat cache list and its layer to one layer's tensors."""

from collections.abc import Iterable, Sequence
from typing import Any

from fastkv.cache import LayerCache
from fastkv.contracts.numbers import is_integer
from fastkv.contracts.presence import refuse_tensor, require_paged, require_static, require_tensor
from fastkv.errors import DtypeError, LayerIndexError, SpecMismatchError
from fastkv.quant import Granularity, QuantSpec, QuantType, quant_spec
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

_LAYOUTS = {Granularity.HEAD: "[Hkv]", Granularity.CHANNEL: "[Hkv, D]"}


def resolve(caches: Sequence[Any], layer: Any, spec: CacheSpec) -> LayerCache:
    """The tensors of one layer.

    Works by index arithmetic and attributes only and never looks inside a tensor, so sentinels
    do in a test.

    Args:
        caches: the flat list: of each layer K, V and, where its format is dynamic, K scales and V
            scales; `spec.num_tensors` in all.
        layer: has `layer_id`, and may have `cache_quant_type_str` (absent means `none`) and, for
            a static format, either `static_scales` (a `StaticScales`) or `cache_k_scale`,
            `cache_k_out_scale`, `cache_v_scale`, `cache_v_out_scale`, `cache_k_zp`, `cache_v_zp`.
        spec: what `caches` holds.

    Raises:
        LayerIndexError: `layer_id` is absent, no integer or outside the spec.
        UnknownNameError: a format that nobody knows.
        SpecMismatchError: the layer's format is not the spec's, `caches` is not a list of the
            spec's length, or one tensor stands twice in the layer.
        MissingTensorError: a cache tensor, scale or zero point that the format requires is None.
        SurplusTensorError: scales or zero points on a format without them. The static scale
            attributes on the layer of a dynamic format are legal, since engines create and never
            fill them; they are not read.
    """
    layer_id = _layer_id(layer, spec)
    quant = spec.layer_quant(layer_id, op=_OP)
    _require_same_format(layer, quant)
    _require_list(caches, spec, quant)
    first = spec.first_index(layer_id)
    names = ("k", "v", "k_scale", "v_scale")[: quant.tensors_per_layer]
    found = dict(zip(names, caches[first : first + quant.tensors_per_layer], strict=True))
    at = {
        f"caches[{first + i}], layer {layer_id}'s {n}": t for i, (n, t) in enumerate(found.items())
    }
    require_paged(_OP, at, quant)
    _require_distinct(at, quant)
    return LayerCache(spec, layer_id, **found, static=_static(layer, quant))


def _require_distinct(tensors: dict[str, Any], quant: QuantSpec) -> None:
    """No tensor stands twice in a layer, as in `[tensor] * 4`; compared by identity alone."""
    named: dict[int, str] = {}
    for name, tensor in tensors.items():
        other = named.setdefault(id(tensor), name)
        if other != name:
            raise SpecMismatchError(
                _OP,
                name,
                format=quant.name.value,
                expected="a tensor of its own",
                got=f"the very tensor of {other}",
            )


def _layer_id(layer: Any, spec: CacheSpec) -> int:
    layer_id = getattr(layer, "layer_id", None)
    if not is_integer(layer_id) or not 0 <= layer_id < spec.num_layers:
        raise LayerIndexError(
            _OP,
            "layer.layer_id",
            expected=f"an integer, 0 to {spec.num_layers - 1}",
            got=repr(layer_id) if hasattr(layer, "layer_id") else "no such attribute",
        )
    return int(layer_id)


def _require_list(caches: object, spec: CacheSpec, quant: QuantSpec) -> None:
    # One tensor with a leading dimension is refused: some libraries index it by copy, and what is
    # written into a copy is lost.
    length = len(caches) if isinstance(caches, Sequence) else None
    if length == spec.num_tensors:
        return
    raise SpecMismatchError(
        _OP,
        "caches",
        format=quant.name.value,
        expected=f"a list of {spec.num_tensors} tensors for {spec.num_layers} layers",
        got=type(caches).__name__ if length is None else f"{length} tensors",
    )


def _require_same_format(layer: Any, quant: QuantSpec) -> None:
    argument = "layer.cache_quant_type_str"
    name = getattr(layer, "cache_quant_type_str", None)
    given = quant_spec(QuantType.NONE if name is None else name, op=_OP, argument=argument)
    if given is not quant:
        raise SpecMismatchError(
            _OP,
            argument,
            format=quant.name.value,
            expected=f"{quant.name.value}, as the spec says for this layer",
            got=given.name.value if name is not None else "no name, which means none",
        )


def _static(layer: Any, quant: QuantSpec) -> StaticScales | None:
    bundle = getattr(layer, LAYER_BUNDLE, None)
    if not quant.needs_zp:
        _refuse(layer, LAYER_ZERO_POINTS, "the format has no zero points", quant)
    if not quant.needs_static:
        require_static(_OP, f"layer.{LAYER_BUNDLE}", bundle, quant)
        # The one legal surplus: engines create these on the layers of a dynamic format and never
        # fill them, so they are not even read there.
        if not quant.needs_paged_scales:
            _refuse(layer, LAYER_SCALES, "the format has no scales", quant)
        return None
    if bundle is None:
        return _bundle_from_attributes(layer, quant)
    if not isinstance(bundle, StaticScales):
        raise DtypeError(
            _OP,
            f"layer.{LAYER_BUNDLE}",
            format=quant.name.value,
            expected="a StaticScales or None",
            got=type(bundle).__name__,
        )
    beside = f"the layer has {LAYER_BUNDLE} too, and which one would count?"
    _refuse(layer, (*LAYER_SCALES, *LAYER_ZERO_POINTS), beside, quant)
    require_static(_OP, f"layer.{LAYER_BUNDLE}", bundle, quant)
    return bundle


def _refuse(layer: Any, names: Iterable[str], why: str, quant: QuantSpec) -> None:
    for name in names:
        refuse_tensor(_OP, f"layer.{name}", getattr(layer, name, None), why, quant)


def _bundle_from_attributes(layer: Any, quant: QuantSpec) -> StaticScales:
    found = {}
    layouts = " or ".join(_LAYOUTS[layout] for layout in quant.granularities)
    expected = f"a tensor {layouts}, or layer.{LAYER_BUNDLE}"
    for name, field in (LAYER_SCALES | LAYER_ZERO_POINTS).items():
        if field in quant.static_fields:
            found[field] = getattr(layer, name, None)
            require_tensor(_OP, f"layer.{name}", found[field], expected, quant)
    return StaticScales(**found)
