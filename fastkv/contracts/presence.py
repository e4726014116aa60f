# SPDX-License-Identifier: Apache-2.0
"""Which tensors a format requires, and which it refuses: the one place that decides."""

from typing import TYPE_CHECKING, Any

from fastkv.cache import LayerCache
from fastkv.errors import DtypeError, MissingTensorError, SurplusTensorError

if TYPE_CHECKING:
    from fastkv.quant import QuantSpec
    from fastkv.scales import StaticScales


def require_tensor(
    op: str, argument: str, tensor: object, expected: str, quant: "QuantSpec | None" = None
) -> None:
    """Raise `MissingTensorError` if a tensor is None."""
    if tensor is None:
        raise MissingTensorError(op, argument, format=_name(quant), expected=expected, got="None")


def require_kind(
    op: str, argument: str, value: object, kind: type, quant: "QuantSpec | None" = None
) -> None:
    """Raise unless a value is there and of a class of fastkv."""
    require_tensor(op, argument, value, f"a {kind.__name__}", quant)
    if not isinstance(value, kind):
        raise DtypeError(
            op,
            argument,
            format=_name(quant),
            expected=f"a {kind.__name__}",
            got=type(value).__name__,
        )


def refuse_tensor(op: str, argument: str, tensor: object, why: str, quant: "QuantSpec") -> None:
    """Raise `SurplusTensorError` if a tensor is not None."""
    if tensor is not None:
        raise SurplusTensorError(
            op, argument, format=_name(quant), expected=f"None: {why}", got=_kind(tensor)
        )


def require_paged(op: str, tensors: dict[str, Any], quant: "QuantSpec") -> None:
    """Check presence of `k`, `v`, `k_scale` and `v_scale`, each on its own.

    Args:
        op: names the caller in the error.
        tensors: what was given, under the names the caller knows them by; the keys end in
            `k`, `v`, `k_scale`, `v_scale`.
        quant: the format.
    """
    for name, tensor in tensors.items():
        if not name.endswith("_scale"):
            require_tensor(op, name, tensor, "a cache tensor [N, Hkv, P, D_storage]", quant)
        elif quant.needs_paged_scales:
            require_tensor(op, name, tensor, "dequant multipliers [N, Hkv, P]", quant)
        else:
            refuse_tensor(op, name, tensor, "the format pages no scales", quant)


def require_static(
    op: str, argument: str, static: "StaticScales | None", quant: "QuantSpec"
) -> None:
    """Check presence of the static bundle and of each field in it."""
    if not quant.needs_static:
        kind = "dynamic scales, paged in the cache" if quant.needs_paged_scales else "no scales"
        refuse_tensor(op, argument, static, f"the format has {kind}", quant)
        return
    require_tensor(op, argument, static, "StaticScales of the layer", quant)
    for name in ("k_quant", "k_dequant", "v_quant", "v_dequant"):
        require_tensor(op, f"{argument}.{name}", getattr(static, name), "a multiplier", quant)
    for name in ("k_zp", "v_zp"):
        zero_point = getattr(static, name)
        if quant.needs_zp:
            require_tensor(op, f"{argument}.{name}", zero_point, "a zero point [Hkv, D]", quant)
        else:
            refuse_tensor(
                op, f"{argument}.{name}", zero_point, "the format has no zero points", quant
            )


def require_cache(op: str, cache: LayerCache) -> "QuantSpec":
    """Check presence of everything a layer's format requires; returns the format."""
    require_kind(op, "cache", cache, LayerCache)
    quant = cache.spec.layer_quant(cache.layer_id, op=op)
    names = ("k", "v", "k_scale", "v_scale")
    require_paged(op, {f"cache.{name}": getattr(cache, name) for name in names}, quant)
    require_static(op, "cache.static", cache.static, quant)
    return quant


def _name(quant: "QuantSpec | None") -> str | None:
    return None if quant is None else quant.name.value


def _kind(tensor: object) -> str:
    shape = getattr(tensor, "shape", None)
    kind = type(tensor).__name__
    return kind if shape is None else f"{kind} of shape {list(shape)}"
