# SPDX-License-Identifier: Apache-2.0
"""Attention over fastkv's paged cache, driven as an engine would: one request, chunk by chunk."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv import ops
from fastkv.backends import get_backend, resolve
from fastkv.batch import BatchMeta
from fastkv.eval.decoder import hidden_states, logits, rope
from fastkv.eval.gguf_llama import Llama
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


class Session:
    """One request of the model over a cache of one format.

    Args:
        model: the weights.
        spec: the cache; see `eval_spec`.
        scales: the bundle of each layer of a static format.
        capacity: tokens that the cache must hold.
        backend: which backend attends. `append` reads every K and V, those of the chunk itself
            included, from the quantized cache.
    """

    def __init__(
        self,
        model: Llama,
        spec: CacheSpec,
        scales: Mapping[int, StaticScales],
        capacity: int,
        backend: str = "append",
    ) -> None:
        self.model, self.spec = model, spec
        self.cached = 0
        self._backend = get_backend(spec, name=backend)
        self._layers = [
            EvalLayer(i, spec.layer_quant(i).name.value, scales.get(i))
            for i in range(spec.num_layers)
        ]
        self._rope = rope(model, capacity)
        pages = -(-capacity // spec.page_size)
        self._caches = spec.allocate(pages)
        # Shuffled pages: a page taken for another is seen.
        self._table = np.random.default_rng(0).permutation(pages).astype(np.int32)[None]

    def hidden(self, ids: "NDArray[np.int64]") -> "F32":
        """Append tokens to the request; the hidden states `[T, C]` of these."""
        meta = self._meta(len(ids))

        def attend(layer: int, qkv: "F32") -> "F32":
            out: F32 = self._backend.forward_mixed(qkv, self._layers[layer], meta)
            return out

        states = hidden_states(self.model, ids, attend)
        self.cached += len(ids)
        return states

    def logits(self, ids: "NDArray[np.int64]") -> "F32":
        """Append tokens to the request; their next-token logits `[T, vocabulary]`."""
        return logits(self.model, self.hidden(ids))

    def kept(self, layer: int) -> "tuple[F32, F32]":
        """K, after RoPE, and V as a layer's cache gives them back: `[cached, Hkv, D]` each."""
        shape = (self.cached, self.spec.num_kv_heads, self.spec.head_dim)
        k, v = np.empty(shape, np.float32), np.empty(shape, np.float32)
        ops.gather_kv(
            resolve(self._caches, self._layers[layer], self.spec),
            cache_seqlens=_int32(self.cached),
            block_table=self._table,
            cu_seqlens_k=_int32(0, self.cached),
            out_k=k,
            out_v=v,
        )
        return k, v

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
