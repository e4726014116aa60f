# SPDX-License-Identifier: Apache-2.0
"""Attention over fastkv's paged cache, driven as an engine would: one request, chunk by chunk."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.backends import get_backend
from fastkv.batch import BatchMeta
from fastkv.calibrate.observe import Observer
from fastkv.errors import UnsupportedError
from fastkv.eval.decoder import hidden_states, logits, rope
from fastkv.eval.errors import OP
from fastkv.eval.gguf_llama import Llama
from fastkv.eval.model import Size
from fastkv.eval.subject import FormatCache, Peer, Subject
from fastkv.scales import StaticScales
from fastkv.spec import CacheSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]

PAGE_SIZE = 64


@dataclass(frozen=True, slots=True)
class EvalLayer:
    """What an engine's attention layer would carry."""

    layer_id: int
    cache_quant_type_str: str
    static_scales: StaticScales | None


def eval_spec(model: Llama, quant: str, dtype: str = "float32") -> CacheSpec:
    """The cache of the model in one format."""
    return CacheSpec(model.num_layers, model.num_kv_heads, model.head_dim, PAGE_SIZE, quant, dtype)


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages of a cache that belong to one request.

    Attributes:
        caches: the flat list of cache tensors.
        ids: int32, the request's page ids in the order of its tokens.
        cached: tokens that the pages hold already.
    """

    caches: list[Any]
    ids: "NDArray[np.int32]"
    cached: int = 0

    @classmethod
    def of_one_request(cls, spec: CacheSpec, capacity: int) -> "Pages":
        """A cache of its own, shuffled: a page taken for another is seen."""
        count = -(-capacity // spec.page_size)
        ids = np.random.default_rng(0).permutation(count).astype(np.int32)
        return cls(spec.allocate(count), ids)


class Session:
    """One request of the model over a cache of one format.

    Args:
        model: the weights.
        spec: the cache; see `eval_spec`.
        scales: the bundle of each layer of a static format.
        capacity: tokens that the cache must hold.
        backend: which backend attends. `append` reads every K and V, those of the chunk itself
            included, from the quantized cache.
        exact_prefill: `fill` attends to K and V as they come, and leaves them quantized.
        pages: the request's part of a shared cache, for `capacity` tokens; None: its own cache.
    """

    def __init__(
        self,
        model: Llama,
        spec: CacheSpec,
        scales: Mapping[int, StaticScales],
        capacity: int,
        backend: str = "append",
        exact_prefill: bool = False,
        pages: Pages | None = None,
    ) -> None:
        self.model, self.spec = model, spec
        held = pages or Pages.of_one_request(spec, capacity)
        self.cached = held.cached
        self._backend = get_backend(spec, name=backend)
        # flash attends to the K and V of the chunk itself as they come.
        self._prefill = get_backend(spec, name="flash") if exact_prefill else self._backend
        self._layers = [
            EvalLayer(i, spec.layer_quant(i).name.value, scales.get(i))
            for i in range(spec.num_layers)
        ]
        self._rope = rope(model, capacity)
        self._caches, self._table = held.caches, held.ids[None]

    def hidden(self, ids: "NDArray[np.int64]") -> "F32":
        """Append tokens to the request; the hidden states `[T, C]` of these."""
        return self._run(ids, self._backend)

    def logits(self, ids: "NDArray[np.int64]") -> "F32":
        """Append tokens to the request; their next-token logits `[T, vocabulary]`."""
        return logits(self.model, self.hidden(ids))

    def fill(self, ids: "NDArray[np.int64]") -> None:
        """Append the prefill, exactly attended to where the session was opened so."""
        self._run(ids, self._prefill)

    def size(self) -> Size:
        """What the cache holds."""
        return Size(self.spec.storage_dtype(0), self.spec.bytes_per_token())

    def _run(self, ids: "NDArray[np.int64]", backend: Any) -> "F32":
        meta = self._meta(len(ids))

        def attend(layer: int, qkv: "F32") -> "F32":
            out: F32 = backend.forward_mixed(qkv, self._layers[layer], meta)
            return out

        states = hidden_states(self.model, ids, attend)
        self.cached += len(ids)
        return states

    def _meta(self, new: int) -> BatchMeta:
        return BatchMeta(
            self._caches,
            self.spec,
            cu_seqlens_q=_int32(0, new),
            cache_seqlens=_int32(self.cached),
            block_table=self._table,
            cu_seqlens_k=_int32(0, self.cached + new),
            total_k=self.cached + new,
            rope=self._rope,
        )


def _int32(*values: int) -> "NDArray[Any]":
    return np.array(values, np.int32)


class NumpyModel:
    """A Llama in the NumPy decoder, its caches fastkv's (a `fastkv.eval.model.Model`).

    Args:
        llama: the weights.
    """

    none_is_exact = True

    def __init__(self, llama: Llama) -> None:
        self.llama = llama
        self.num_layers = llama.num_layers

    def check(self, subjects: tuple[Subject, ...], dtype: str, backend: str) -> None:
        """Raise where a cache is not one of fastkv, or no backend serves it."""
        for subject in subjects:
            if isinstance(subject, Peer):
                raise UnsupportedError(
                    OP,
                    f"--peers {subject.name}",
                    expected="a model of transformers",
                    got="the NumPy decoder",
                    hint="--engine transformers loads a GGUF file there.",
                )
            get_backend(self.spec(subject, dtype), name=backend)

    def spec(self, subject: FormatCache, dtype: str) -> CacheSpec:
        """The cache of the model in one format."""
        return eval_spec(self.llama, subject.quant.name, dtype)

    def exact(self, capacity: int) -> Session:
        """Over a float32 cache."""
        return Session(self.llama, eval_spec(self.llama, "none"), {}, capacity)

    def open(
        self,
        subject: Subject,
        scales: Mapping[int, StaticScales],
        capacity: int,
        *,
        dtype: str,
        backend: str,
    ) -> Session:
        """Over the cache under test."""
        assert isinstance(subject, FormatCache), "checked"
        spec, exact = self.spec(subject, dtype), subject.exact_prefill
        return Session(self.llama, spec, scales, capacity, backend, exact)

    def observe(self, ids: "NDArray[np.int64]", observer: Observer, positions: int | None) -> None:
        """Hand every layer's Q, K and V of a sequence to the observer."""
        from fastkv.calibrate.gguf import observe_llama  # which imports this module

        observe_llama(self.llama, [ids], observer, positions=positions)
