# SPDX-License-Identifier: Apache-2.0
"""What the backends share: the ops they are given, a layer's options, the frame of a call."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from fastkv.backends.features import BACKENDS, BackendRow, refuse_unserved
from fastkv.backends.resolve import resolve
from fastkv.batch import BatchMeta
from fastkv.cache import LayerCache
from fastkv.contracts.numbers import is_finite, is_integer, is_number
from fastkv.contracts.presence import require_kind, require_tensor
from fastkv.errors import ContractError
from fastkv.quant import QuantSpec
from fastkv.spec import CacheSpec


class Ops(Protocol):
    """The ops a backend drives: `fastkv.ops`, or whatever a test puts in their place.

    They may also have `check_step` (see `fastkv.ops.check_step`), which a backend calls before it
    writes; a recording stand-in needs none.
    """

    def rope_write_kv(self, qkv: Any, cache: LayerCache, **kwargs: Any) -> Any:
        """See `fastkv.ops.rope_write_kv`."""

    def gather_kv(self, cache: LayerCache, **kwargs: Any) -> None:
        """See `fastkv.ops.gather_kv`."""

    def paged_attention(self, q: Any, cache: LayerCache, **kwargs: Any) -> Any:
        """See `fastkv.ops.paged_attention`."""

    def masked_attention(self, q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        """See `fastkv.ops.masked_attention`."""

    def zeros_beside(self, like: Any, shape: tuple[int, ...]) -> Any:
        """See `fastkv.ops.zeros_beside`."""


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """What an attention layer asks for, read from its attributes; all are optional, None is absent.

    Attributes:
        window: `layer.sliding_window`; 0 and None mean none.
        soft_cap: `layer.soft_cap`; 0 and None mean none.
        sinks: `layer.sinks`, float32 `[Hq]`.
        scale: `layer.softmax_scale`; None is `1 / sqrt(D)`.
        causal: `layer.causal`, True where absent.
        q_norm_weight: `layer.q_norm_weight`, `[D]`.
        k_norm_weight: `layer.k_norm_weight`, `[D]`.
        norm_eps: `layer.rms_norm_eps`, 1e-6 where absent.
        norm_after_rope: `layer.norm_after_rope`, False where absent.
    """

    window: int | None = None
    soft_cap: float | None = None
    sinks: Any = None
    scale: float | None = None
    causal: bool = True
    q_norm_weight: Any = None
    k_norm_weight: Any = None
    norm_eps: float = 1e-6
    norm_after_rope: bool = False

    @classmethod
    def of(cls, layer: Any) -> "LayerOptions":
        """The options of a layer."""
        found = {field: getattr(layer, name, None) for field, name in _ATTRIBUTES.items()}
        for field in ("window", "soft_cap"):
            if is_number(found[field]) and found[field] == 0:
                found[field] = None
        return cls(**{field: value for field, value in found.items() if value is not None})

    def check(self, op: str, quant: QuantSpec) -> None:
        """Raise unless the numbers are ones that the ops can use."""
        for field, (is_usable, expected) in _NUMBERS.items():
            value = getattr(self, field)
            if value is not None and not is_usable(value):
                raise ContractError(
                    op,
                    f"layer.{_ATTRIBUTES[field]}",
                    format=quant.name.value,
                    expected=f"None or {expected}",
                    got=repr(value) if is_number(value) else type(value).__name__,
                )

    def write_arguments(self) -> dict[str, Any]:
        """What `rope_write_kv` takes of them."""
        names = ("q_norm_weight", "k_norm_weight", "norm_eps", "norm_after_rope")
        return {name: getattr(self, name) for name in names}

    def attention_arguments(self) -> dict[str, Any]:
        """What both attention ops take of them."""
        names = ("scale", "causal", "window", "soft_cap", "sinks")
        return {name: getattr(self, name) for name in names}

    def features(self, meta: BatchMeta) -> set[str]:
        """The features that this layer and batch need."""
        used = {name for name in ("window", "soft_cap") if getattr(self, name) is not None}
        if self.sinks is not None:
            used.add("sinks")
        if meta.mask_offsets is not None:
            if meta.num_decode:
                used.add("mask_offsets_on_decode")
            if meta.num_decode < meta.num_requests:
                used.add("mask_offsets_on_prefill")
        return used


# Fields of `LayerOptions` that are numbers -> test, and what it asks for.
_NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "window": (lambda x: is_integer(x) and x >= 1, "an integer of at least 0"),
    "soft_cap": (lambda x: is_finite(x) and x > 0, "a finite number of at least 0"),
    "scale": (is_finite, "a finite number"),
    "norm_eps": (lambda x: is_finite(x) and x >= 0, "a finite number of at least 0"),
}

# Field of `LayerOptions` -> the layer's attribute.
_ATTRIBUTES = {
    "window": "sliding_window",
    "soft_cap": "soft_cap",
    "sinks": "sinks",
    "scale": "softmax_scale",
    "causal": "causal",
    "q_norm_weight": "q_norm_weight",
    "k_norm_weight": "k_norm_weight",
    "norm_eps": "rms_norm_eps",
    "norm_after_rope": "norm_after_rope",
}


class Backend(ABC):
    """An attention backend: finds a layer's tensors and drives the ops over a mixed batch.

    Args:
        ops: the ops to drive; None takes `fastkv.ops`, imported at the first call.
    """

    name: ClassVar[str]

    def __init__(self, ops: Ops | None = None) -> None:
        self._ops = ops

    @property
    def ops(self) -> Ops:
        """The ops that this backend drives."""
        if self._ops is None:
            from fastkv import ops

            self._ops = ops  # type: ignore[assignment] # a module of exactly these functions
        assert self._ops is not None, "set just above"
        return self._ops

    @property
    def row(self) -> BackendRow:
        """This backend's row of the feature table."""
        return BACKENDS[self.name]

    def forward_mixed(self, qkv: Any, layer: Any, meta: BatchMeta) -> Any:
        """Write the new tokens' K and V, and attend, for one layer and one step.

        Args:
            qkv: `[T, (Hq + 2*Hkv) * D]`, bf16, fp16 or fp32: query, key and value heads, before
                norm and RoPE.
            layer: see `resolve` for the attributes that carry scales and `LayerOptions` for the
                others.
            meta: the batch: prefill, prefill over a cached prefix, decode, draft tokens and empty
                requests, in one.

        Returns:
            `[T, Hq, D]` in qkv's dtype; 0 in rows that see no key or belong to no request.

        Raises:
            ContractError: before any op was called, what the format, the backend or the batch
                lacks; from an op, what its contract refuses.
        """
        op = f"{self.name}.forward_mixed"
        require_kind(op, "meta", meta, BatchMeta)
        require_kind(op, "meta.spec", meta.spec, CacheSpec)
        require_tensor(op, "meta.caches", meta.caches, "the engine's list of cache tensors")
        cache = resolve(meta.caches, layer, meta.spec)
        require_tensor(op, "qkv", qkv, "a tensor [T, (Hq + 2*Hkv) * D]", cache.quant)
        meta.check(op, cache.quant)
        options = LayerOptions.of(layer)
        options.check(op, cache.quant)
        refuse_unserved(self.row, options.features(meta))
        self._check_step(op, qkv, cache, options, meta)
        return self._forward(qkv, cache, options, meta)

    def _check_step(
        self, op: str, qkv: Any, cache: LayerCache, options: LayerOptions, meta: BatchMeta
    ) -> None:
        """Let the ops look at what only an op after the write would refuse."""
        check = getattr(self.ops, "check_step", None)
        gathers = "gather_kv" in self.row.prefill and meta.num_decode < meta.num_requests
        sums = meta.cu_seqlens_k if gathers else None
        if check is None or (options.sinks is meta.mask_offsets is sums is None):
            return
        check(
            op,
            qkv,
            cache,
            **batch_arguments(meta),
            sinks=options.sinks,
            mask_offsets=meta.mask_offsets,
            cu_seqlens_k=sums,
            num_decode=meta.num_decode,
        )

    @abstractmethod
    def _forward(self, qkv: Any, cache: LayerCache, options: LayerOptions, meta: BatchMeta) -> Any:
        """Drive the ops; everything that policy can check has been checked."""


def batch_arguments(meta: BatchMeta, requests: slice | None = None) -> dict[str, Any]:
    """What the paged ops take of a batch, or of a contiguous run of its requests."""
    if requests is None:
        return {
            "cu_seqlens_q": meta.cu_seqlens_q,
            "cache_seqlens": meta.cache_seqlens,
            "block_table": meta.block_table,
        }
    return {
        "cu_seqlens_q": meta.cu_seqlens_q[_sums(requests)],
        "cache_seqlens": meta.cache_seqlens[requests],
        "block_table": meta.block_table[requests],
    }


def _sums(requests: slice) -> slice:
    """The entries of a cu_seqlens that a run of requests needs: one more than requests."""
    return slice(requests.start, None if requests.stop is None else requests.stop + 1)
