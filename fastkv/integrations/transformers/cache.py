# SPDX-License-Identifier: Apache-2.0
"""`PagedCache`: a cache of transformers whose layers are fastkv's pages."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastkv.cache import LayerCache
from fastkv.errors import ContractError, ShapeError, UnsupportedError
from fastkv.integrations.transformers.binding import (
    Bound,
    Formats,
    model_shape,
    require_formats,
    require_model,
    require_options,
    require_scales,
)
from fastkv.integrations.transformers.layers import AttentionOnly, PagedKeys, PagedLayer
from fastkv.integrations.transformers.pages import Copies, Pages
from fastkv.integrations.transformers.storage import Storage
from fastkv.quant import QuantType
from fastkv.scales import StaticScales

# Pages that a growing cache adds at once: at least so many tokens, and a quarter of what it has.
_AHEAD = 256


class PagedCache(AttentionOnly):
    """The KV cache of a model of transformers in fastkv's pages, in any format.

    Hand it to `generate(past_key_values=…)` or to the model, whose attn_implementation must be
    "fastkv". The first attention fixes layers, KV heads, head dim, dtype, device and batch; pages
    are allocated ahead and the cache grows as it must.

    Args:
        format: a format, or one a layer.
        scales: `StaticScales` of each layer, for static formats; `calibrate` makes them.
        page_size: P, tokens a page. On a GPU 16, 32, 64 or 128.
        reserve: tokens a request to allocate for at first; 0 allocates for the prompt and 256 more.
        scale_dtype: of the paged scales of dynamic formats.

    Attributes:
        length: tokens of each request, padding included; the same for all.
        spec: the `CacheSpec`, None before the first attention.

    Raises:
        UnknownNameError: a format that nobody knows.
        MissingTensorError: a static format, and no scales.
        SurplusTensorError: scales, and no static format.
        SpecError: a page size, a reserve or a dtype of scales that is none.
    """

    def __init__(
        self,
        format: Formats = QuantType.NONE,  # noqa: A002 - the public term for a cache format
        *,
        scales: Mapping[int, StaticScales] | None = None,
        page_size: int = 64,
        reserve: int = 0,
        scale_dtype: str = "float32",
    ) -> None:
        rows = require_formats(format)
        require_scales(rows, scales)
        require_options(rows, page_size, reserve, scale_dtype)
        super().__init__(layers=[])
        self.length = 0
        self._wanted = (format, scales, page_size, scale_dtype)
        self._reserve = reserve
        self._bound: Bound | None = None
        self._pages: Any = None
        self._last = -1

    @property
    def spec(self) -> Any:
        """The `CacheSpec`, None before the first attention."""
        return None if self._bound is None else self._bound.spec

    def prepare(self, model: Any, batch_size: int) -> "PagedCache":
        """Do now what the first attention would do, and allocate what `reserve` asks for.

        For `torch.compile`, which cannot trace the check of static scales, and for servers, which
        want memory early.

        Args:
            model: whose cache this will be.
            batch_size: B, beams and returned sequences counted.

        Returns:
            The cache itself.

        Raises:
            ContractError, SelectionError: as the first attention.
        """
        require_model(model, "fastkv")
        config = model.config.get_text_config()
        shape = (batch_size, *model_shape(config))
        self._start(Bound.of(config, shape, model.dtype, model.device, *self._wanted))
        self._allocate(0)
        for layer in range(self.spec.num_layers):
            self._storage.layer(layer, self._pages.count)
        return self

    # What transformers calls

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[PagedKeys, Any]:
        """Hand keys and values on to the attention, which checks before it writes.

        Args:
            key_states: `[B, Hkv, S, D]`, rotated.
            value_states: as `key_states`.
            layer_idx: which layer's.
            *args: not used.
            **kwargs: not used.
        """
        while len(self.layers) <= layer_idx:
            self.layers.append(PagedLayer(self, len(self.layers)))
        return PagedKeys(self, layer_idx, key_states), value_states

    @property
    def batch_size(self) -> int:
        """B; -1 before the first attention."""
        return -1 if self._bound is None else self._bound.batch

    @property
    def is_initialized(self) -> bool:
        """Whether the first attention was."""
        return self._bound is not None

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the first attention initializes, `reserve` allocates ahead."""
        raise UnsupportedError(
            "PagedCache.early_initialization",
            "cache",
            expected="a first forward, which initializes",
            got="a call ahead of it",
            hint="PagedCache(reserve=…) allocates pages ahead.",
        )

    def reset(self) -> None:
        """Forget all tokens and the batch; the pages stay for a batch of the same size."""
        self.length = 0
        if self._pages is not None:
            self._after.zero_()
            self._pages.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of each request.

        Raises:
            ContractError: a positive number, or more tokens than there are.
        """
        if not -self.length <= tokens_to_remove <= 0:
            raise ContractError(
                "PagedCache.crop",
                "tokens_to_remove",
                expected=f"{-self.length} to 0: minus the number of tokens to remove",
                got=repr(tokens_to_remove),
            )
        if tokens_to_remove:
            self.length += tokens_to_remove
            self._after.add_(tokens_to_remove)
            self._copy(self._pages.crop(self.length))

    def reorder_cache(self, beam_idx: Any) -> None:
        """Request b becomes what `beam_idx[b]` was. Copies the page that is being filled, no other.

        Args:
            beam_idx: integers `[B]`.

        Raises:
            ShapeError: another number of them; `batch_select_indices` changes the batch.
        """
        if self._pages is None:
            return
        if tuple(beam_idx.shape) != (self.batch_size,):
            raise ShapeError(
                "PagedCache.reorder_cache",
                "beam_idx",
                expected=f"[B] = [{self.batch_size}]",
                got=str(list(beam_idx.shape)),
            )
        self._copy(self._pages.reorder(beam_idx.to(self._after.device), self.length))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each request `repeats` times, one after the other."""
        if self._bound is not None:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the requests of these indices, in this order."""
        if self._bound is not None:
            self._select(torch.arange(self.batch_size)[torch.as_tensor(indices).cpu()])

    # What the attention calls

    def bind(self, module: Any, layer_idx: int, query: Any, key: Any, value: Any) -> None:
        """Check a layer's step against the cache; the first of all fixes what the cache is.

        Args:
            module: the attention, with the model's `config`.
            layer_idx: which layer's.
            query: `[B, Hq, S, D]`.
            key: `[B, Hkv, S, D]`.
            value: as `key`.

        Raises:
            ContractError: the model, or the step, is not one that the cache serves. Nothing was
                written then.
            SelectionError: no kernel serves the model on its device.
        """
        bound = self._bound
        if bound is None or (not self.length and bound.batch != key.shape[0]):
            batch, heads, _, dim = key.shape
            shape = (batch, query.shape[1], heads, dim)
            bound = Bound.of(module.config, shape, key.dtype, key.device, *self._wanted)
            bound.check(module, layer_idx, query, key, value)
            self._start(bound)
        else:
            bound.check(module, layer_idx, query, key, value)

    def step(self, layer_idx: int, new: int) -> tuple[LayerCache, dict[str, Any]]:
        """A layer's tensors, with room for a step's new tokens, and the step's batch tensors.

        The first layer of a forward opens the step: layers come in order.

        Args:
            layer_idx: which layer's.
            new: S, new tokens a request.
        """
        if layer_idx <= self._last:
            self._open(new)
        self._last = layer_idx
        batch = {
            "cu_seqlens_q": self._ends,
            "cache_seqlens": self._before,
            "block_table": self._pages.table,
        }
        return self._storage.layer(layer_idx, self._pages.count), batch

    def keys_values(self, layer_idx: int) -> tuple[Any, Any]:
        """K and V of a layer as attention reads them: float32 `[B, Hkv, length, D]` each."""
        return self._storage.read(layer_idx, self._after, self._pages.table, self.length)

    def _start(self, bound: Bound) -> None:
        """An empty cache for a model and a batch."""
        self._bound, self._storage = bound, Storage(bound)
        self._pages, self._last = None, bound.spec.num_layers
        self._count(0)

    def _open(self, new: int) -> None:
        """Make room for a step, and count it; nothing is read back from the device."""
        tokens = self.length + new
        self._allocate(tokens)
        self._ends = self._ones if new == 1 else self._ones * new
        self._before.copy_(self._after)
        self._after.add_(new)
        self.length = tokens

    def _allocate(self, tokens: int) -> None:
        """Pages for `tokens` a request, and some ahead."""
        bound = self._bound
        assert bound is not None, "bind or prepare comes first"
        page_size = bound.spec.page_size
        if self._pages is None:
            ahead = max(self._reserve, tokens) if self._reserve else tokens + _AHEAD
            self._pages = Pages(bound.batch, -(-ahead // page_size), page_size, bound.device)
        elif tokens > self._pages.capacity:
            columns = self._pages.columns
            more = columns + max(columns // 4, -(-_AHEAD // page_size))
            self._pages.grow(max(more, -(-tokens // page_size)))

    def _copy(self, copies: Copies | None) -> None:
        self._storage.copy(copies, self._pages.count)

    def _select(self, indices: Any) -> None:
        """Another batch, of the requests `indices`, int64 on the CPU; each on pages of its own."""
        assert self._bound is not None, "checked by the callers"
        bound = replace(self._bound, batch=len(indices))
        if self._pages is not None:
            old, page_size = self._pages.table, bound.spec.page_size
            self._storage.keep(old[indices.to(bound.device)].flatten().long())
            self._pages = Pages(bound.batch, old.shape[1], page_size, bound.device)
        self._bound = bound
        self._count(self.length)

    def _count(self, length: int) -> None:
        """The batch tensors of a cache of `length` tokens a request, between steps."""
        assert self._bound is not None, "an attention was"
        size, device = self._bound.batch, self._bound.device
        self._ones = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._after = torch.full((size,), length, dtype=torch.int32, device=device)
        self._before = torch.zeros_like(self._after)
