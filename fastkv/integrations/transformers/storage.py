# SPDX-License-Identifier: Apache-2.0
"""The cache tensors of each layer: allocated, grown, copied, dequantized."""

from dataclasses import replace
from typing import Any

import torch

from fastkv import ops
from fastkv.cache import LayerCache
from fastkv.integrations.transformers.binding import Bound
from fastkv.integrations.transformers.pages import Copies

_TENSORS = ("k", "v", "k_scale", "v_scale")


class Storage:
    """The pages' tensors.

    Args:
        bound: what the cache is for.
    """

    def __init__(self, bound: Bound) -> None:
        self._bound = bound
        self._layers: list[LayerCache | None] = [None] * bound.spec.num_layers

    def layer(self, index: int, pages: int) -> LayerCache:
        """A layer's tensors, of at least `pages` pages."""
        found = self._layers[index]
        if found is None or found.k.shape[0] < pages:
            found = self._layers[index] = self._sized(index, pages, found)
        return found

    def copy(self, copies: Copies | None, pages: int) -> None:
        """Copy pages in every layer that has some."""
        if copies is None:
            return
        for index, layer in enumerate(self._layers):
            if layer is not None:
                ops.copy_pages(self.layer(index, pages), *copies)

    def keep(self, ids: Any) -> None:
        """Make page i what page `ids[i]` was; ids int64 `[n]`, any of them any number of times."""
        for index, layer in enumerate(self._layers):
            if layer is not None:
                chosen = {
                    name: _bits(tensor)[ids].view(tensor.dtype)
                    for name in _TENSORS
                    if (tensor := getattr(layer, name)) is not None
                }
                self._layers[index] = replace(layer, **chosen)

    def read(self, index: int, lengths: Any, table: Any, length: int) -> tuple[Any, Any]:
        """K and V of a layer, dequantized: float32 `[B, Hkv, length, D]` each."""
        spec, batch, device = self._bound.spec, table.shape[0], table.device
        shape = (batch * length, spec.num_kv_heads, spec.head_dim)
        k, v = (torch.empty(shape, dtype=torch.float32, device=device) for _ in "kv")
        ends = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        layer = self._layers[index]
        assert layer is not None, "a layer that was attended to has tensors"
        ops.gather_kv(
            layer, cache_seqlens=lengths, block_table=table, cu_seqlens_k=ends, out_k=k, out_v=v
        )
        k, v = (x.view(batch, length, *shape[1:]).transpose(1, 2) for x in (k, v))
        return k, v

    def _sized(self, index: int, pages: int, old: LayerCache | None) -> LayerCache:
        spec, device = self._bound.spec, self._bound.device
        tensors = {}
        for want in spec.layer_tensors(index, pages):
            dtype = getattr(torch, want.dtype)
            made = tensors[want.name] = torch.zeros(want.shape, dtype=dtype, device=device)
            if old is not None:
                kept = getattr(old, want.name)
                made[: kept.shape[0]].copy_(kept)
        return LayerCache(spec, index, **tensors, static=self._bound.static[index])


def _bits(tensor: Any) -> Any:
    """float8 by its bytes: PyTorch does not index it everywhere."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
