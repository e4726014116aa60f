# SPDX-License-Identifier: Apache-2.0
"""Observe a Llama out of a GGUF file, in the NumPy decoder of `fastkv.eval`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv import ops
from fastkv.backends import resolve
from fastkv.calibrate.observe import Observer
from fastkv.eval.decoder import hidden_states, rope
from fastkv.eval.gguf_llama import Llama
from fastkv.eval.serve import EvalLayer
from fastkv.rope import Rope
from fastkv.spec import CacheSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]

_PAGE_SIZE = 64


def observe_llama(
    model: Llama,
    sequences: "Iterable[NDArray[np.int64]]",
    observer: Observer,
    *,
    interleaved: bool = True,
    positions: int | None = None,
) -> None:
    """Run the model over token sequences and hand every layer's Q, K and V to the observer.

    Args:
        model: the weights.
        sequences: token ids, each sequence from position 0.
        observer: for the model's layers.
        interleaved: leave the channels of K in GGUF's order, in which RoPE rotates neighbours;
            False observes them as engines with split halves ("NeoX") cache them.
        positions: K is observed at all positions below this, moved there; None: at its own.
    """
    for ids in sequences:
        attention = _Attention(model, len(ids), observer, interleaved, positions or len(ids))
        hidden_states(model, ids, attention)


def starts(length: int, positions: int) -> list[int]:
    """Where copies of a sequence begin, that together with itself cover the positions."""
    last = positions - length
    return [min(start, last) for start in range(length, positions, length)]


def move(k: "F32", table: Rope, by: int) -> "F32":
    """K that RoPE rotated, neighbours together, `by` positions on: `[T, Hkv, D]`.

    The first token stays: it is the sequence's in every context, and most models' attention sink.
    """
    cos, sin = table.cos[by], table.sin[by]
    rotary = 2 * len(cos)
    even, odd = k[..., 0:rotary:2], k[..., 1:rotary:2]
    moved = k.copy()
    moved[..., 0:rotary:2], moved[..., 1:rotary:2] = even * cos - odd * sin, even * sin + odd * cos
    moved[:1] = k[:1]
    return moved


def split_halves(x: "F32", rotary_dim: int) -> "F32":
    """Channels rotated as neighbours, reordered to split halves: `[..., D]`."""
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    return np.concatenate([turned[..., 0::2], turned[..., 1::2], rest], axis=-1)


class _Attention:
    """Causal attention of one whole sequence (an `Attend` of the decoder), observed."""

    def __init__(
        self, model: Llama, length: int, observer: Observer, interleaved: bool, positions: int
    ) -> None:
        self._model, self._observer, self._interleaved = model, observer, interleaved
        self._rope = rope(model, max(length, positions))
        self._starts = starts(length, positions)
        pages = -(-length // _PAGE_SIZE)
        spec = CacheSpec(1, model.num_kv_heads, model.head_dim, _PAGE_SIZE, "none", "float32")
        self._cache = resolve(spec.allocate(pages), EvalLayer(0, "none", None), spec)
        self._table = np.arange(pages, dtype=np.int32)[None]
        self._ends = np.array([0, length], np.int32)

    def __call__(self, layer: int, qkv: "F32") -> "F32":
        q, k, v = ops.rope_write_kv(
            qkv,
            self._cache,
            cu_seqlens_q=self._ends,
            cache_seqlens=self._ends[:1],
            block_table=self._table,
            rope=self._rope,
            return_kv=True,
        )
        out: Any = ops.masked_attention(
            q, k, v, cu_seqlens_q=self._ends, cu_seqlens_k=self._ends, causal=True
        )
        dim = self._model.rotary_dim
        rotated = [q, k, *(move(k, self._rope, start) for start in self._starts)]
        if not self._interleaved:
            rotated = [split_halves(x, dim) for x in rotated]
        seen_q, seen_k, *later = rotated
        self._observer.add(layer, seen_q, seen_k, v, self._model.head_dim**-0.5, later=later)
        attended: F32 = out
        return attended
