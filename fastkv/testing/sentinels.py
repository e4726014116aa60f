# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for tensors, caches and layers: they have names and shapes, and no values."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal, NoReturn, TypeAlias

from fastkv.errors import unknown_name
from fastkv.quant import Granularity, QuantSpec
from fastkv.scales import StaticScales
from fastkv.spec import CacheSpec

#: Attributes of an engine's layer -> field of `StaticScales`. Written down again, and not imported
#: from `resolve`: a mistake in its table shows here.
SCALE_ATTRIBUTES = {
    "cache_k_scale": "k_quant",
    "cache_k_out_scale": "k_dequant",
    "cache_v_scale": "v_quant",
    "cache_v_out_scale": "v_dequant",
}
ZERO_POINT_ATTRIBUTES = {"cache_k_zp": "k_zp", "cache_v_zp": "v_zp"}

Scales: TypeAlias = Literal["attributes", "bundle"]
#: How a layer of a static format may carry its scales.
SCALES: tuple[Scales, ...] = ("attributes", "bundle")

NUM_PAGES = 11
# Methods of array libraries that change how a tensor is laid out, and not what it holds.
_LAYOUT_METHODS = frozenset({"contiguous", "reshape", "view"})


class SentinelError(AssertionError):
    """Somebody asked a sentinel for values, or changed it."""


class SentinelTensor:
    """Stands for a tensor: has a name, a shape and a dtype, and no values.

    Slices, and `view`, `reshape` and `contiguous`, give sentinels that remember which tensor they
    come from. Everything that would read values (`bool`, `int`, comparison, arithmetic, `for`,
    conversion to an array) raises `SentinelError`, and so do `copy` and setting an attribute. Two
    sentinels are equal when they are the same object.

    Args:
        name: what failures call it.
        shape: None where unknown.
        dtype: the dtype's name; None where unknown.

    Attributes:
        root: the sentinel of which this is a part; itself for one that is no part.
        part: `(start, stop)`, the rows of the root's first dimension that it covers; None where
            that cannot be said.
    """

    __slots__ = ("dtype", "name", "part", "root", "shape")

    name: str
    shape: tuple[int, ...] | None
    dtype: str | None
    root: "SentinelTensor"
    part: tuple[int, int] | None

    def __init__(
        self, name: str, shape: tuple[int, ...] | None = None, dtype: str | None = None
    ) -> None:
        part = (0, shape[0]) if shape else None
        self._set(name=name, shape=shape, dtype=dtype, root=self, part=part)

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _derived(
        self, suffix: str, shape: tuple[int, ...] | None, part: tuple[int, int] | None
    ) -> "SentinelTensor":
        new = SentinelTensor(self.name + suffix, shape, self.dtype)
        new._set(root=self.root, part=part)
        return new

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self._known_shape())

    def _known_shape(self) -> tuple[int, ...]:
        if self.shape is None:
            raise SentinelError(f"the shape of {self!r} is not known")
        return self.shape

    def is_whole(self) -> bool:
        """Whether it covers all of its root."""
        whole = self.root
        return self is whole or (self.part is not None and self.part == whole.part)

    def __len__(self) -> int:
        return self._known_shape()[0]

    def __getitem__(self, key: object) -> "SentinelTensor":
        shape = self._known_shape()
        rows, *others = key if isinstance(key, tuple) else (key,)
        keeps_the_rest = all(other in (Ellipsis, slice(None)) for other in others)
        if isinstance(rows, slice) and rows.step in (None, 1) and shape and keeps_the_rest:
            start, stop, _ = rows.indices(shape[0])
            stop = max(start, stop)
            part = None if self.part is None else (self.part[0] + start, self.part[0] + stop)
            text = f"[{start}:{stop}]"
            return self._derived(text, (stop - start, *shape[1:]), part)
        return self._derived(f"[{_key_text(key)}]", None, None)

    def __getattr__(self, name: str) -> Any:
        if name not in _LAYOUT_METHODS:
            raise AttributeError(
                f"{self!r} stands for a tensor and has no {name!r}: "
                "policy reads shapes and dtypes, slices and hands on"
            )
        return lambda *args, **kwargs: self._derived(f".{name}(…)", None, self.part)

    def __setattr__(self, name: str, value: object) -> None:
        raise SentinelError(f"attribute {name!r} was set on {self!r}: tensors carry none")

    def __delattr__(self, name: str) -> None:
        raise SentinelError(f"attribute {name!r} was deleted from {self!r}")

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise SentinelError(f"{self!r} was asked for values, which policy never reads")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SentinelError(f"{self!r} was copied, and a copy would be another tensor")

    def __iter__(self) -> Iterator[Any]:
        self._refuse()

    __bool__ = __int__ = __float__ = __index__ = __complex__ = __contains__ = _refuse
    __array__ = __dlpack__ = __setitem__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __matmul__ = __floordiv__ = __mod__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __pow__ = __neg__ = __abs__ = _refuse


def _key_text(key: object) -> str:
    if isinstance(key, tuple):
        return ", ".join(_key_text(one) for one in key)
    if isinstance(key, slice):
        start, stop = ("" if end is None else str(end) for end in (key.start, key.stop))
        return f"{start}:{stop}" if key.step is None else f"{start}:{stop}:{key.step}"
    return "..." if key is Ellipsis else repr(key)


def sentinel_caches(spec: CacheSpec, num_pages: int = NUM_PAGES) -> list[SentinelTensor]:
    """The flat cache list of a spec; each tensor's name says its index, layer and role."""
    caches: list[SentinelTensor] = []
    for layer_id in range(spec.num_layers):
        for tensor in spec.layer_tensors(layer_id, num_pages):
            name = f"caches[{len(caches)}] = layer {layer_id}'s {tensor.name}"
            caches.append(SentinelTensor(name, tensor.shape, tensor.dtype))
    return caches


def sentinel_layer(
    spec: CacheSpec, layer_id: int, scales: Scales = "attributes", **attributes: Any
) -> SimpleNamespace:
    """An attention layer as `fastkv.backends.resolve` takes it.

    Args:
        spec: the cache; it names the layer's format.
        layer_id: the layer.
        scales: of a static format, `attributes` puts each multiplier and zero point on the layer,
            as engines do; `bundle` puts a `StaticScales` there.
        attributes: more of them, or others in place of these.

    Returns:
        A layer with `layer_id`, `cache_quant_type_str` and the scales of its format. With
        `attributes`, a layer of a dynamic format has static scale attributes too, as in engines
        that create and never fill them: they must reach no op.
    """
    if scales not in SCALES:
        raise unknown_name("sentinel_layer", "scales", scales, SCALES)
    quant = spec.layer_quant(layer_id, op="sentinel_layer")
    found: dict[str, Any] = {"layer_id": layer_id, "cache_quant_type_str": quant.name.value}
    found |= (_bundle if scales == "bundle" else _attributes)(spec, quant, f"layer {layer_id}'s ")
    return SimpleNamespace(**(found | attributes))


def _attributes(spec: CacheSpec, quant: QuantSpec, owner: str) -> dict[str, Any]:
    if quant.needs_paged_scales:
        unfilled = {name: f"{owner}{name}, never filled" for name in SCALE_ATTRIBUTES}
        return {name: SentinelTensor(text) for name, text in unfilled.items()}
    named = SCALE_ATTRIBUTES | ZERO_POINT_ATTRIBUTES
    return {
        name: _static(spec, quant, owner + name)
        for name, field in named.items()
        if field in quant.static_fields
    }


def _bundle(spec: CacheSpec, quant: QuantSpec, owner: str) -> dict[str, Any]:
    if not quant.needs_static:
        return {}
    fields = {
        field: _static(spec, quant, f"{owner}static_scales.{field}")
        for field in quant.static_fields
    }
    return {"static_scales": StaticScales(**fields)}


def _static(spec: CacheSpec, quant: QuantSpec, name: str) -> SentinelTensor:
    heads, dim = spec.num_kv_heads, spec.head_dim
    per_head = quant.granularities[0] == Granularity.HEAD
    return SentinelTensor(name, (heads,) if per_head else (heads, dim), "float32")
