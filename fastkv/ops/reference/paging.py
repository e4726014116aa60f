# SPDX-License-Identifier: Apache-2.0
"""Tokens in pages: where they lie, how they are written and read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.arrays import numpy_dtype
from fastkv.cache import LayerCache
from fastkv.ops.reference.codecs import Codec, Params, codec, params

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]

# Tokens decoded at once: their K or V of a few heads stay in the L2 cache between being gathered
# from their pages and being multiplied.
CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Paged:
    """K or V of one layer, seen through its codec.

    Attributes:
        data: `[N, Hkv, P, D_storage]`, in the storage dtype.
        scale: `[N, Hkv, P]`, or None.
        params: static parameters.
        codec: of the layer's format.
    """

    data: "NDArray[Any]"
    scale: "NDArray[Any] | None"
    params: Params
    codec: Codec

    @classmethod
    def of(cls, cache: LayerCache, side: str) -> "Paged":
        """One side, `k` or `v`, of a layer's cache."""
        storage = numpy_dtype(cache.spec.storage_dtype(cache.layer_id))
        return cls(
            getattr(cache, side).view(storage),  # bytes may come as uint8
            getattr(cache, f"{side}_scale"),
            params(cache.static, side, cache.spec.num_kv_heads),
            codec(cache.quant),
        )

    @property
    def page_size(self) -> int:
        """P."""
        return int(self.data.shape[2])

    def write(self, x: "F32", pages: "NDArray[Any]", slots: "NDArray[Any]") -> None:
        """Quantize and store tokens.

        Args:
            x: `[n, Hkv, D]` float32.
            pages: `[n]` page ids; -1 drops the token.
            slots: `[n]` places within the pages.
        """
        kept = pages >= 0
        pages, slots = pages[kept], slots[kept]
        scale_dtype = None if self.scale is None else self.scale.dtype
        stored, scale = self.codec.encode(
            x[kept].transpose(1, 0, 2), self.params, self.data.dtype, scale_dtype
        )
        self.data[pages, :, slots] = stored.transpose(1, 0, 2)
        if self.scale is not None and scale is not None:
            self.scale[pages, :, slots] = scale.T

    def read(self, pages: "NDArray[Any]") -> "F32":
        """Dequantize whole pages, in order: float32 `[Hkv, m * P, D]`; page -1 reads as page 0."""
        heads = np.arange(self.data.shape[1])[:, None]
        at = np.maximum(pages, 0)[None, :]
        tokens = len(pages) * self.page_size
        stored = self.data[at, heads].reshape(len(heads), tokens, -1)
        scale = None if self.scale is None else self.scale[at, heads].reshape(len(heads), tokens)
        return self.codec.decode(stored, self.params, scale)


def places(
    block_table: "NDArray[Any]", requests: "NDArray[Any]", positions: "NDArray[Any]", page_size: int
) -> "tuple[NDArray[Any], NDArray[Any]]":
    """Page and slot of tokens, given the request and the position of each."""
    return block_table[requests, positions // page_size], positions % page_size


class PagedKeys:
    """The keys of one request, read chunk by chunk for attention (a `KeySource`)."""

    def __init__(self, k: Paged, v: Paged, pages: "NDArray[Any]", length: int) -> None:
        self._sides = {"k": k, "v": v}
        self._pages = pages[: -(-length // k.page_size)]
        self._page_size = k.page_size
        self.length = length
        self.heads = int(k.data.shape[1])
        self._absent = bool((self._pages < 0).any())
        per_page = max(1, CHUNK_TOKENS // k.page_size)
        self.chunk = per_page * k.page_size

    def read(self, side: str, start: int, stop: int) -> "F32":
        """Float32 `[Hkv, stop - start, D]` of tokens `start .. stop`; `start` begins a chunk."""
        pages = self._pages[start // self._page_size : -(-stop // self._page_size)]
        return self._sides[side].read(pages)[:, : stop - start]

    def present(self, start: int, stop: int) -> "NDArray[np.bool_] | None":
        """Which of the tokens lie on a page; None when all do."""
        if not self._absent:
            return None
        return np.repeat(self._pages >= 0, self._page_size)[start:stop]
