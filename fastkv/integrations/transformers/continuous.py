# SPDX-License-Identifier: Apache-2.0
"""`generate_batch` of transformers over fastkv's pages.

transformers has no public hook for this. What is used here is looked up when it is needed, and
refused by name where it is missing: the table of allocators, the base class of allocators, and the
place of "sdpa" in the registry of attention functions. Tests pin the version that has them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastkv.cache import LayerCache
from fastkv.errors import UnsupportedError
from fastkv.integrations import torch as fastkv_torch
from fastkv.integrations.transformers.binding import (
    Formats,
    Scales,
    require_formats,
    require_kernels,
    require_scales,
    static_scales,
)
from fastkv.quant import QuantType
from fastkv.spec import CacheSpec

_OP = "continuous_batching"
_PACKAGE = "transformers.generation.continuous_batching"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_TAKEN_OVER = "sdpa"  # one of the names that generate_batch takes
_ALIGNMENT = 256  # bytes, of a page and of each tensor in it


@contextmanager
def continuous_batching(
    model: Any,
    format: Formats = QuantType.NONE,  # noqa: A002 - the public term for a cache format
    *,
    scales: Scales = None,
) -> Iterator[None]:
    """Within the block, `model.generate_batch` stores and attends in fastkv's pages.

    One model at a time: the allocators of transformers and its attention function "sdpa" are
    replaced for the process, and put back at the end. Ask for a page size that the kernels serve
    with `ContinuousBatchingConfig(page_size=…)`, and leave `auto_switch_to_flash` off.

    Args:
        model: a causal language model whose layers are all of full attention.
        format: a format, or one a layer.
        scales: `StaticScales` of each layer, for static formats.

    Raises:
        UnknownNameError: a format that nobody knows.
        MissingTensorError, SurplusTensorError: scales missing, or given to no use.
        UnsupportedError: a layer of another kind; a transformers without these places.
    """
    require_scales(require_formats(format), scales)
    _require_full_attention(model.config)
    table, base = _place("cache", "ATTN_TYPE_TO_ALLOCATOR"), _place("cache", "PagedAttentionCache")
    before, kept = model.config._attn_implementation, dict(table)
    original = ALL_ATTENTION_FUNCTIONS[_TAKEN_OVER]
    table.pop(_SLIDING, None)
    table[_FULL] = _allocator(kept[_FULL], format, scales)
    AttentionInterface.register(_TAKEN_OVER, _attention(original, base))
    model.set_attn_implementation(_TAKEN_OVER)
    try:
        yield
    finally:
        AttentionInterface.register(_TAKEN_OVER, original)
        table.update(kept)
        model.set_attn_implementation(before)


def _place(module: str, name: str) -> Any:
    try:
        return getattr(import_module(f"{_PACKAGE}.{module}"), name)
    except (AttributeError, ImportError) as error:
        raise UnsupportedError(
            _OP,
            "transformers",
            expected=f"a version with {_PACKAGE}.{module}.{name}, 5.23 say",
            got=f"none: {error}",
        ) from error


def _require_full_attention(config: Any) -> None:
    groups = _place("cache", "group_layers_by_attn_type")(config)
    if set(groups) != {_FULL}:
        raise UnsupportedError(
            _OP, "model", expected=f"layers of {_FULL} alone", got=", ".join(sorted(groups))
        )


def _attention(plain: Callable[..., tuple[Any, Any]], paged_cache: Any) -> Any:
    """The attention function of a running batch; any other call goes to `plain`."""

    def attend(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        if not isinstance(cache, paged_cache):
            return plain(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                cache=cache,
                **kwargs,
            )
        allocator = cache.layer_to_allocator[module.layer_idx]
        layer, batch = allocator.layers[module.layer_idx], allocator.batch(kwargs)
        rows = [x[0].transpose(0, 1).flatten(1) for x in (query, key, value)]
        q = fastkv_torch.rope_write_kv(torch.cat(rows, dim=-1), layer, **batch)
        sinks = kwargs.get("s_aux")
        options = {
            "scale": scaling,
            "window": kwargs.get("sliding_window") or None,
            "soft_cap": kwargs.get("softcap"),
            "sinks": None if sinks is None else sinks.float(),
        }
        return fastkv_torch.paged_attention(q, layer, **batch, **options)[None], None

    return attend


def _allocator(base: Any, formats: Formats, scales: Scales) -> Any:
    """A class of allocators whose pages hold a layer's tensors of fastkv, one after the other."""

    class PagesAllocator(base):  # type: ignore[misc]
        supports_block_table = False

        def __init__(
            self,
            index: int,
            config: Any,
            num_key_value_heads: int,
            cache_dtype: Any,
            page_size: int,
            layer_indices: list[int],
            allow_block_sharing: bool,
        ) -> None:
            find_head_dim = _place("utils", "find_head_dim")
            dtype = str(cache_dtype).removeprefix("torch.")
            layers, dim = len(layer_indices), find_head_dim(config)
            self.spec = CacheSpec(layers, num_key_value_heads, dim, page_size, formats, dtype)
            self.query_heads = config.num_attention_heads
            self._before_cache_tensor_init(
                index=index,
                layer_indices=layer_indices,
                tokens_per_page=page_size,
                bytes_per_page=max(_page_bytes(self.spec, i) for i in range(layers)),
                allow_block_sharing=allow_block_sharing,
            )

        def register_cache_tensor(
            self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Any, pool: Any
        ) -> None:
            require_kernels(self.spec, self.query_heads, cache_tensor.device)
            static = static_scales(self.spec, scales, cache_tensor.device)
            self.bytes_per_sector = bytes_per_sector
            self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
            self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, cache_tensor, pool)
            self.layers = {
                i: replace(self._views(i, cache_tensor), static=static[i])
                for i in self.layer_indices
            }
            self._step: Any = (None, None)

        def _views(self, layer: int, memory: Any) -> LayerCache:
            blocks, start = len(self._copy_view), layer * self.bytes_per_page
            tensors = {}
            for want in self.spec.layer_tensors(layer, blocks):
                dense = torch.empty(want.shape[1:], device="meta").stride()
                typed = memory.view(getattr(torch, want.dtype))
                item = typed.element_size()
                strides = (self.bytes_per_block // item, *dense)
                tensors[want.name] = typed.as_strided(want.shape, strides, start // item)
                start += _aligned(want.nbytes // blocks)
            return LayerCache(self.spec, layer, **tensors)

        def batch(self, kwargs: dict[str, Any]) -> dict[str, Any]:
            """What the ops need of a step; made once of what transformers hands to each layer."""
            made_of, batch = self._step
            if made_of is not kwargs["write_index"]:
                batch = self._batch(
                    kwargs["read_index"][self.index],
                    kwargs["write_index"][self.index],
                    kwargs["cu_seq_lens_q"].to(torch.int32),
                    kwargs["cu_seq_lens_k"][self.layer_type].to(torch.int32),
                    kwargs["max_length_k"][self.layer_type],
                )
                self._step = (kwargs["write_index"], batch)
            return batch  # type: ignore[no-any-return]

        def _batch(
            self, read: Any, write: Any, ends_q: Any, ends_k: Any, longest: int
        ) -> dict[str, Any]:
            """Pages are found through the places of their first tokens.

            Without a cached token there is no read index, and what is written is all there is.
            """
            lengths = ends_k.diff()
            index, ends = (read, ends_k) if read.numel() else (write, ends_q)
            pages = -(-longest // self.tokens_per_page)
            first = torch.arange(pages, device=ends.device) * self.tokens_per_page
            at = (ends[:-1, None] + first).clamp(max=index.numel() - 1)
            table = index[at] // self.block_physical_stride
            return {
                "cu_seqlens_q": ends_q,
                "cache_seqlens": lengths - ends_q.diff(),
                "block_table": torch.where(first < lengths[:, None], table, -1).to(torch.int32),
            }

        def update(self, *args: Any, **kwargs: Any) -> Any:
            raise UnsupportedError(
                _OP,
                "attn_implementation",
                expected=f"{_TAKEN_OVER!r}, as the block set it",
                got="another",
                hint="ContinuousBatchingConfig(auto_switch_to_flash=False) keeps it.",
            )

    return PagesAllocator


def _page_bytes(spec: CacheSpec, layer: int) -> int:
    return sum(_aligned(tensor.nbytes) for tensor in spec.layer_tensors(layer, 1))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
