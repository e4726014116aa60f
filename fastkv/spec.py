# SPDX-License-Identifier: Apache-2.0
"""Shapes, dtypes, counts and bytes of a model's KV cache: decided here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

from fastkv.contracts.numbers import is_integer
from fastkv.dtypes import FLOATS, ITEMSIZE, canonical_float
from fastkv.errors import LayerIndexError, SpecError, unknown_name
from fastkv.quant import Granularity, QuantSpec, QuantType, quant_spec

if TYPE_CHECKING:
    from fastkv.arrays import LibraryName


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of one cache tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The KV cache of a model, or of one rank's shard of it.

    Args:
        num_layers: attention layers that keep a cache.
        num_kv_heads: Hkv.
        head_dim: D; even for a format that packs two elements a byte.
        page_size: P, tokens a page.
        quant: one format for all layers, or a sequence with one a layer.
        dtype: what `none` layers store: float32, bfloat16 or float16 (bf16, fp16, fp32 are fine).
        scale_dtype: dtype of the paged scales of dynamic formats.

    Raises:
        SpecError: a value no cache can have.
        UnknownNameError: a format that nobody knows; lists the known ones.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    quant: QuantType | str | Sequence[QuantType | str] = QuantType.NONE
    dtype: str = "bfloat16"
    scale_dtype: str = "float32"
    _rows: tuple[QuantSpec, ...] = field(init=False, repr=False, compare=False)
    _first: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "page_size"):
            _require_positive(name, getattr(self, name))
            object.__setattr__(self, name, int(getattr(self, name)))  # NumPy's integers too
        for name in ("dtype", "scale_dtype"):
            object.__setattr__(self, name, _require_float(name, getattr(self, name)))
        rows = _layer_rows(self.quant, self.num_layers)
        for row in rows:
            if self.head_dim % row.elements_per_item:
                raise SpecError(
                    "CacheSpec",
                    "head_dim",
                    format=row.name.value,
                    expected=f"a multiple of {row.elements_per_item}",
                    got=str(self.head_dim),
                )
        uniform = len(set(rows)) == 1
        object.__setattr__(self, "quant", rows[0].name if uniform else tuple(r.name for r in rows))
        object.__setattr__(self, "_rows", rows)
        first = accumulate((row.tensors_per_layer for row in rows), initial=0)
        object.__setattr__(self, "_first", tuple(first))

    def layer_quant(self, layer_id: object, *, op: str = "CacheSpec.layer_quant") -> QuantSpec:
        """The format of a layer; raises `LayerIndexError` outside `0 .. num_layers - 1`."""
        if not is_integer(layer_id) or not 0 <= layer_id < self.num_layers:
            raise LayerIndexError(
                op, "layer_id", expected=f"0 to {self.num_layers - 1}", got=repr(layer_id)
            )
        return self._rows[layer_id]

    def first_index(self, layer_id: int) -> int:
        """Where a layer begins in the flat list: the tensors of all layers before it."""
        self.layer_quant(layer_id, op="CacheSpec.first_index")
        return self._first[layer_id]

    @property
    def num_tensors(self) -> int:
        """Length of the flat cache list."""
        return self._first[-1]

    def storage_dtype(self, layer_id: int) -> str:
        """Dtype of a layer's K and V tensors."""
        return self.layer_quant(layer_id).storage or self.dtype

    def layer_tensors(self, layer_id: int, num_pages: int) -> tuple[TensorSpec, ...]:
        """The tensors of one layer, in the order of the flat list."""
        row = self.layer_quant(layer_id, op="CacheSpec.layer_tensors")
        _require_positive("num_pages", num_pages, op="CacheSpec.layer_tensors")
        paged = (num_pages, self.num_kv_heads, self.page_size)
        data = (*paged, self.head_dim // row.elements_per_item)
        tensors = [TensorSpec(name, data, row.storage or self.dtype) for name in ("k", "v")]
        if row.needs_paged_scales:
            tensors += [
                TensorSpec(name, paged, self.scale_dtype) for name in ("k_scale", "v_scale")
            ]
        return tuple(tensors)

    def tensors(self, num_pages: int) -> tuple[TensorSpec, ...]:
        """All tensors of the flat list, layer after layer."""
        layers = range(self.num_layers)
        return tuple(tensor for i in layers for tensor in self.layer_tensors(i, num_pages))

    def static_bytes(self, granularity: Granularity | str | None = None) -> int:
        """Bytes of all static multipliers and zero points, float32, independent of the tokens.

        Args:
            granularity: layout of the multipliers; None takes each format's preferred one.
        """
        return sum(self._layer_static_bytes(row, granularity) for row in self._rows)

    def _layer_static_bytes(self, row: QuantSpec, granularity: Granularity | str | None) -> int:
        if not row.needs_static:
            return 0
        layout = row.granularities[0] if granularity is None else granularity
        if layout not in row.granularities:
            raise SpecError(
                "CacheSpec.static_bytes",
                "granularity",
                format=row.name.value,
                expected=" or ".join(g.value for g in row.granularities),
                got=str(layout),
            )
        per_field = self.num_kv_heads * (self.head_dim if layout == Granularity.CHANNEL else 1)
        return len(row.static_fields) * per_field * ITEMSIZE["float32"]

    def bytes_per_token(
        self, tokens: int | None = None, granularity: Granularity | str | None = None
    ) -> float:
        """Bytes that one token takes in all layers.

        Args:
            tokens: None counts what grows with every token: K, V and paged scales. A number
                spreads the static multipliers and zero points over that many tokens too.
            granularity: of the static multipliers, as in `static_bytes`.
        """
        page = sum(tensor.nbytes for tensor in self.tensors(1))
        paged = page // self.page_size  # each tensor has P items a page: exact
        if tokens is None:
            return paged
        _require_positive("tokens", tokens, op="CacheSpec.bytes_per_token")
        return paged + self.static_bytes(granularity) / tokens

    def total_bytes(self, num_pages: int, granularity: Granularity | str | None = None) -> int:
        """Bytes of a cache of `num_pages` pages with its static multipliers and zero points."""
        paged = sum(tensor.nbytes for tensor in self.tensors(num_pages))
        return paged + self.static_bytes(granularity)

    def kv_heads(self, tp_rank: int, tp_size: int) -> range:
        """The global KV heads that a rank of a tensor-parallel group holds.

        With more ranks than KV heads, `tp_size / num_kv_heads` neighbouring ranks hold the same
        head.

        Raises:
            SpecError: the rank is outside the group, or neither number divides the other.
        """
        _require_positive("tp_size", tp_size, op="CacheSpec.shard")
        if not hasattr(tp_rank, "__index__") or not 0 <= tp_rank < tp_size:
            raise SpecError(
                "CacheSpec.shard",
                "tp_rank",
                expected="an integer, 0 <= tp_rank < tp_size",
                got=f"rank {tp_rank!r} of {tp_size}",
            )
        heads = self.num_kv_heads
        if heads % tp_size == 0:
            count = heads // tp_size
            return range(tp_rank * count, (tp_rank + 1) * count)
        if tp_size % heads == 0:
            head = tp_rank // (tp_size // heads)
            return range(head, head + 1)
        raise SpecError(
            "CacheSpec.shard",
            "tp_size",
            expected=f"a divisor or a multiple of the {heads} KV heads",
            got=str(tp_size),
        )

    def shard(self, tp_rank: int, tp_size: int) -> "CacheSpec":
        """The spec of one tensor-parallel rank; see `kv_heads` for which heads it holds."""
        return replace(self, num_kv_heads=len(self.kv_heads(tp_rank, tp_size)))

    def allocate(
        self, num_pages: int, library: "LibraryName" = "numpy", device: str = "cpu"
    ) -> list[Any]:
        """The flat list of cache tensors, zero-filled.

        Args:
            num_pages: N, at least 1.
            library: `numpy`, `torch`, `paddle` or `cupy`.
            device: `cpu` or `cuda:0`, as that library can.
        """
        from fastkv import arrays  # the only method that needs an array library

        _require_positive("num_pages", num_pages, op="CacheSpec.allocate")
        if library not in arrays.LIBRARIES:
            raise unknown_name("CacheSpec.allocate", "library", library, arrays.LIBRARIES)
        return [arrays.zeros(library, t.shape, t.dtype, device) for t in self.tensors(num_pages)]


def _require_positive(name: str, value: object, op: str = "CacheSpec") -> None:
    if not is_integer(value) or value < 1:
        raise SpecError(op, name, expected="an integer of at least 1", got=repr(value))


def _require_float(name: str, value: object) -> str:
    dtype = canonical_float(value)
    if dtype is None:
        raise SpecError("CacheSpec", name, expected=f"one of {', '.join(FLOATS)}", got=repr(value))
    return dtype


def _layer_rows(quant: object, num_layers: int) -> tuple[QuantSpec, ...]:
    names = [quant] * num_layers if isinstance(quant, str) else quant
    if not isinstance(names, Sequence):
        return (quant_spec(quant, op="CacheSpec", argument="quant"),) * num_layers
    if len(names) != num_layers:
        raise SpecError(
            "CacheSpec", "quant", expected=f"{num_layers} formats, one a layer", got=str(len(names))
        )
    return tuple(quant_spec(name, op="CacheSpec", argument="quant") for name in names)
