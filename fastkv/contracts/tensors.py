# SPDX-License-Identifier: Apache-2.0
"""Shapes, dtypes, libraries and devices of one call, compared without reading a value.

A `Rule` spells a tensor's shape in symbols (T, B, Hq, ...). A `Checker` binds each symbol to the
first size it meets and holds every later tensor of the call to it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkv.arrays import ArrayInfo, describe
from fastkv.errors import ContractError, DtypeError, PlacementError, ReadOnlyError, ShapeError
from fastkv.quant import Granularity

if TYPE_CHECKING:
    from fastkv.cache import LayerCache
    from fastkv.quant import QuantSpec
    from fastkv.scales import StaticScales
    from fastkv.spec import CacheSpec

FLOAT = ("bfloat16", "float16", "float32")
INT32 = ("int32",)
F32 = ("float32",)


class Rule(NamedTuple):
    """The contract of one tensor: name, shape in symbols, dtypes, whether the op writes it."""

    name: str
    dims: tuple[str, ...]
    dtypes: tuple[str, ...]
    written: bool = False


class Checker:
    """The tensors of one call, held to each other.

    Attributes:
        sizes: what each symbol was bound to.
        first: the first tensor's description: library and device of the call.
        prepared: what an implementation derived from the metadata of a call that passed, and
            wants back at the next call of the same metadata.
        makers: likewise, what makes the call's results, by shape in symbols and dtype.
    """

    def __init__(self, op: str, quant: "QuantSpec | None" = None, **sizes: int) -> None:
        self.op = op
        self.format = None if quant is None else quant.name.value
        self.sizes = sizes
        self.first: ArrayInfo | None = None
        self.prepared: Any = None
        self.makers: dict[tuple[tuple[str, ...], str], Callable[[], Any]] = {}
        self._first_name = ""
        self._dtypes: dict[str, str] = {}

    def tensor(self, rule: Rule, array: Any) -> ArrayInfo:
        """Check one tensor and return its description."""
        info = self.typed(rule.name, rule.dtypes, array)
        self._shape(rule, info)
        if rule.written and not info.writeable:
            raise ReadOnlyError(
                self.op,
                rule.name,
                format=self.format,
                expected="writeable memory, one place an element",
                got="memory that is read-only or overlaps itself",
            )
        return info

    def typed(self, name: str, dtypes: tuple[str, ...], array: Any) -> ArrayInfo:
        """Check library, device and dtype of a tensor of any shape."""
        try:
            info = describe(array, self.op, name)
        except ContractError as error:
            error.format = self.format
            raise
        self._place(name, info)
        if info.dtype not in dtypes:
            raise DtypeError(
                self.op,
                name,
                format=self.format,
                expected=" or ".join(dtypes),
                got=info.dtype,
            )
        self._dtypes[name] = info.dtype
        return info

    def dtype(self, name: str) -> str:
        """Dtype of a tensor that was checked."""
        return self._dtypes[name]

    def given(self, name: str) -> bool:
        """Whether a tensor was given, and checked."""
        return name in self._dtypes

    def optional(self, rule: Rule, array: Any) -> None:
        """Check a tensor that may be None."""
        if array is not None:
            self.tensor(rule, array)

    def _place(self, name: str, info: ArrayInfo) -> None:
        if self.first is None:
            self.first, self._first_name = info, name
        elif info.library != self.first.library or info.device != self.first.device:
            raise PlacementError(
                self.op,
                name,
                format=self.format,
                expected=f"a {self.first.library} tensor on {self.first.device}, as "
                f"{self._first_name} is",
                got=f"a {info.library} tensor on {info.device}",
            )

    def _shape(self, rule: Rule, info: ArrayInfo) -> None:
        if len(info.shape) != len(rule.dims):
            raise self._wrong_shape(rule, info)
        for symbol, size in zip(rule.dims, info.shape, strict=True):
            name, plus = _split(symbol)
            wanted = self.sizes.setdefault(name, size - plus)
            if wanted + plus != size or wanted < 0:
                raise self._wrong_shape(rule, info)

    def _wrong_shape(self, rule: Rule, info: ArrayInfo) -> ShapeError:
        return ShapeError(
            self.op,
            rule.name,
            format=self.format,
            expected=self._spell(rule.dims),
            got=str(list(info.shape)),
        )

    def _spell(self, dims: tuple[str, ...]) -> str:
        known = []
        for symbol in dims:
            name, plus = _split(symbol)
            size = self.sizes.get(name, -1)
            known.append("?" if size < 0 else str(size + plus))
        return f"[{', '.join(dims)}] = [{', '.join(known)}]"


def _split(symbol: str) -> tuple[str, int]:
    """`B+1` is one more than B."""
    name = symbol.removesuffix("+1")
    return name, int(name != symbol)


def check_cache(checker: Checker, cache: "LayerCache", *, written: bool) -> None:
    """Check K, V, paged scales and static bundle of a layer against its spec."""
    spec = cache.spec
    quant = cache.quant
    packed = spec.head_dim // quant.elements_per_item
    checker.sizes |= {"Hkv": spec.num_kv_heads, "P": spec.page_size, "D": spec.head_dim}
    checker.sizes["D_storage"] = packed
    # Libraries without the storage dtype hold its bytes.
    storage = spec.storage_dtype(cache.layer_id)
    dtypes = (storage,) if quant.storage in (None, "uint8") else (storage, "uint8")
    for name in ("k", "v"):
        dims = ("N", "Hkv", "P", "D_storage")
        checker.tensor(Rule(f"cache.{name}", dims, dtypes, written), getattr(cache, name))
    if quant.needs_paged_scales:
        for name in ("k_scale", "v_scale"):
            rule = Rule(f"cache.{name}", ("N", "Hkv", "P"), (spec.scale_dtype,), written)
            checker.tensor(rule, getattr(cache, name))
    if cache.static is not None:
        _check_bundle(checker, "cache.static", cache.static, quant)


def check_static(op: str, static: "StaticScales", spec: "CacheSpec", quant: "QuantSpec") -> None:
    """Check shapes and dtypes of a bundle against a spec."""
    checker = Checker(op, quant, Hkv=spec.num_kv_heads, D=spec.head_dim)
    _check_bundle(checker, "static", static, quant)


def _check_bundle(
    checker: Checker, argument: str, static: "StaticScales", quant: "QuantSpec"
) -> None:
    heads, dim = checker.sizes["Hkv"], checker.sizes["D"]
    shapes: dict[str, tuple[int, ...]] = {}
    if Granularity.HEAD in quant.granularities:
        shapes["[Hkv]"] = (heads,)
    if Granularity.CHANNEL in quant.granularities:
        shapes |= {"[Hkv, D]": (heads, dim), "[Hkv * D]": (heads * dim,)}
    for name in quant.static_fields:
        info = checker.typed(f"{argument}.{name}", FLOAT, getattr(static, name))
        if info.shape not in shapes.values():
            raise ShapeError(
                checker.op,
                f"{argument}.{name}",
                format=checker.format,
                expected=" or ".join(f"{dims} = {list(s)}" for dims, s in shapes.items()),
                got=str(list(info.shape)),
            )
