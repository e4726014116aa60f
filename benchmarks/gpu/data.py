# SPDX-License-Identifier: Apache-2.0
"""Random caches in every format, and where their tokens lie."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from fastkv import CacheSpec, LayerCache, StaticScales
from fastkv.quant import QUANT_SPECS, Granularity, QuantSpec

# Dequant multipliers of K and V that give values of about 1 and are not 1 themselves. K and V
# differ, so that one in the other's place shows in the comparison with the peer.
MULTIPLIERS = {"int8": (0.02, 0.03), "uint8": (0.3, 0.4), "float8_e4m3fn": (0.75, 1.25)}


@dataclass(frozen=True, slots=True)
class Format:
    """A format with one layout of its static multipliers."""

    quant: QuantSpec
    granularity: Granularity | None

    @property
    def label(self) -> str:
        """The format's name; with the layout where it is not the preferred one."""
        name = self.quant.name.value
        if self.granularity is None or self.granularity is self.quant.granularities[0]:
            return name
        return f"{name}/{self.granularity.value}"

    @property
    def multipliers(self) -> tuple[float, float]:
        """Of K and V."""
        return MULTIPLIERS[self.quant.storage] if self.quant.storage else (1.0, 1.0)

    @property
    def bits(self) -> int:
        """Bits an element."""
        per_item = 16 if self.quant.storage is None else 8
        return per_item // self.quant.elements_per_item


def _formats() -> dict[str, Format]:
    every = [Format(row, g) for row in QUANT_SPECS.values() for g in row.granularities or (None,)]
    return {each.label: each for each in every}


FORMATS = _formats()


@dataclass(slots=True)
class Pool:
    """K and V of several sets of inputs, each `pages` pages, one behind the other.

    The bytes have no page size of their own: `layer` views them at any, so that one pool serves
    all page sizes and all of the peers that take the same layout.
    """

    format: Format
    heads: int
    dim: int
    tokens: int
    sets: int
    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    static: StaticScales | None

    @classmethod
    def random(
        cls, fmt: Format, heads: int, dim: int, tokens: int, sets: int, device: torch.device
    ) -> "Pool":
        """Random codes; multipliers and zero points that are neither 1 nor 0."""
        items = sets * tokens * heads * (dim // fmt.quant.elements_per_item)
        k, v = (_codes(fmt, items, device) for _ in "kv")
        scales: list[torch.Tensor | None] = [None, None]
        if fmt.quant.needs_paged_scales:
            rows = sets * tokens * heads
            scales = [0.5 + torch.rand(rows, device=device) for _ in "kv"]
        return cls(
            fmt, heads, dim, tokens, sets, k, v, *scales, static_scales(fmt, heads, dim, device)
        )

    @staticmethod
    def bytes_per_token_of(fmt: Format, heads: int, dim: int) -> int:
        """Bytes of one token, K and V with their paged scales."""
        return int(CacheSpec(1, heads, dim, 1, fmt.quant.name, "bfloat16").bytes_per_token())

    def spec(self, page: int) -> CacheSpec:
        """Of one layer."""
        return CacheSpec(1, self.heads, self.dim, page, self.format.quant.name, "bfloat16")

    def paged(self, flat: torch.Tensor | None, page: int, index: int) -> torch.Tensor | None:
        """One set's part of a flat tensor, `[N, Hkv, P, ...]`; None stays None."""
        if flat is None:
            return None
        share = flat.numel() // self.sets
        own = flat[index * share : (index + 1) * share]
        shape = (self.tokens // page, self.heads, page)
        return own.view(*shape, -1) if flat is self.k or flat is self.v else own.view(shape)

    def layer(self, page: int, index: int) -> LayerCache:
        """One set as the ops take it."""
        tensors = (self.paged(x, page, index) for x in (self.k, self.v, self.k_scale, self.v_scale))
        return LayerCache(self.spec(page), 0, *tensors, static=self.static)


def _codes(fmt: Format, items: int, device: torch.device) -> torch.Tensor:
    storage = fmt.quant.storage
    if storage is None:
        return torch.randn(items, device=device, dtype=torch.bfloat16)
    if storage.startswith("float8"):
        values = torch.randn(items, device=device, dtype=torch.bfloat16)
        return values.to(getattr(torch, storage))
    low, high = (-127, 128) if storage == "int8" else (0, 256)
    return torch.randint(low, high, (items,), device=device, dtype=getattr(torch, storage))


def static_scales(fmt: Format, heads: int, dim: int, device: torch.device) -> StaticScales | None:
    """Multipliers equal over the heads, so that a peer's one scalar is the same scale."""
    if not fmt.quant.needs_static:
        return None
    shape = (heads,) if fmt.granularity is Granularity.HEAD else (heads, dim)
    k, v = fmt.multipliers
    arrays = [torch.full(shape, x, device=device) for x in (1 / k, k, 1 / v, v)]
    points = []
    if fmt.quant.needs_zp:
        points = [torch.rand(shape, device=device) * 4 - 2 for _ in "kv"]
    return StaticScales(*arrays, *points)


@dataclass(frozen=True, slots=True)
class Batch:
    """Metadata of a step: every request has the same lengths, its pages lie in random order."""

    page: int
    queries: int
    context: int
    cu_seqlens_q: torch.Tensor
    cache_seqlens: torch.Tensor
    block_table: torch.Tensor

    @classmethod
    def make(
        cls, requests: int, queries: int, context: int, page: int, device: torch.device
    ) -> "Batch":
        """`context` counts the new tokens too."""
        pages = ceil(context / page)
        table = torch.randperm(requests * pages, device=device).int().view(requests, pages)
        cu = torch.arange(requests + 1, device=device, dtype=torch.int32) * queries
        cached = torch.full((requests,), context - queries, device=device, dtype=torch.int32)
        return cls(page, queries, context, cu, cached, table)

    @property
    def requests(self) -> int:
        """B."""
        return int(self.block_table.shape[0])

    @property
    def meta(self) -> dict[str, Any]:
        """The keyword arguments that every op takes."""
        return {
            "cu_seqlens_q": self.cu_seqlens_q,
            "cache_seqlens": self.cache_seqlens,
            "block_table": self.block_table,
        }


def relative_difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of two results in the norm of all elements."""
    got, want = got.float().flatten(), want.float().flatten()
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))
