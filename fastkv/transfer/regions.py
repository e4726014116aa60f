# SPDX-License-Identifier: Apache-2.0
"""The memory of a cache: every tensor that holds a part of a block, found once from the spec.

A *block* is one page of all layers: K, V and, where the format pages them, K scales and V scales.
A block id names all of these parts at once, so that no transfer and no store can leave a scale
behind. The bytes of a block are its parts in the order of the flat cache list: layer after layer,
and in each layer `k`, `v`, `k_scale`, `v_scale`.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastkv import arrays
from fastkv.dtypes import ITEMSIZE
from fastkv.errors import (
    BlockIdError,
    BlockSizeError,
    DtypeError,
    PlacementError,
    ReadOnlyError,
    ShapeError,
    SpecMismatchError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastkv.spec import CacheSpec, TensorSpec

Ids = Iterable[int]


class Region(NamedTuple):
    """One cache tensor as memory.

    Attributes:
        name: as in `layers.3.k_scale`.
        address: of page 0.
        nbytes: of one page.
        stride: bytes from one page to the next; more than `nbytes` where tensors interleave.
    """

    name: str
    address: int
    nbytes: int
    stride: int


class Regions:
    """All memory of one cache, by block.

    Args:
        spec: what the cache is; on a rank of a tensor-parallel group, the rank's own.
        caches: the flat list of its tensors `[N, Hkv, P, …]`, of NumPy, PyTorch or Paddle, on the
            CPU. The bytes of each page must be contiguous; pages may lie apart.

    Attributes:
        num_blocks: N.
        block_nbytes: bytes of one block in all regions.
        regions: one a tensor, in the order of the flat list.
        pages: of each region, its memory: uint8 `[N, bytes of a page]`.

    Raises:
        SpecMismatchError: a list of another length than the spec's, or tensors that overlap.
        ShapeError, DtypeError: a tensor that the spec does not have.
        PlacementError: a tensor on a GPU.
        ReadOnlyError: a tensor that cannot be written.
        UnsupportedError: pages whose bytes are not contiguous.
    """

    def __init__(self, spec: "CacheSpec", caches: Sequence[Any]) -> None:
        self.spec = spec
        self.num_blocks = _num_pages(spec, caches)
        self._caches = tuple(caches)  # the addresses below are good as long as these live
        names = [
            (layer, tensor)
            for layer in range(spec.num_layers)
            for tensor in spec.layer_tensors(layer, self.num_blocks)
        ]
        self.pages = [
            _page_bytes(spec, i, layer, tensor, array)
            for i, ((layer, tensor), array) in enumerate(zip(names, caches, strict=True))
        ]
        self.regions = tuple(
            Region(f"layers.{layer}.{tensor.name}", *_memory(pages))
            for (layer, tensor), pages in zip(names, self.pages, strict=True)
        )
        self.block_nbytes = sum(region.nbytes for region in self.regions)
        _require_apart(self.regions, self.num_blocks)

    def extents(self) -> list[tuple[int, int]]:
        """`(address, bytes)` of the memory that holds all regions, for an engine to register.

        Regions that interleave are within one extent.
        """
        merged: list[tuple[int, int]] = []
        for start, end in sorted(_extent(region, self.num_blocks) for region in self.regions):
            if merged and start < sum(merged[-1]):
                first = merged[-1][0]
                merged[-1] = (first, max(sum(merged[-1]), end) - first)
            else:
                merged.append((start, end - start))
        return merged

    def check_ids(self, op: str, argument: str, ids: Ids) -> "NDArray[np.int64]":
        """The ids as an array.

        Raises:
            BlockIdError: an id that is no integer from 0 to N - 1, or comes twice.
        """
        return check_ids(op, argument, ids, self.num_blocks)

    def read_block(self, block_id: int) -> memoryview:
        """A copy of one block's bytes, `block_nbytes` of them, in the order above."""
        (i,) = self.check_ids("Regions.read_block", "block_id", [block_id])
        return np.concatenate([pages[i] for pages in self.pages]).data

    def read_blocks(self, ids: Ids, out: "NDArray[np.uint8] | None" = None) -> "NDArray[np.uint8]":
        """Copies of blocks, uint8 `[len(ids), block_nbytes]`, one row a block.

        Args:
            ids: block ids, each once.
            out: takes the copies; its first rows are returned.
        """
        found = self.check_ids("Regions.read_blocks", "ids", ids)
        if out is None:
            out = np.empty((len(found), self.block_nbytes), np.uint8)
        at = 0
        for pages, region in zip(self.pages, self.regions, strict=True):
            out[: len(found), at : at + region.nbytes] = pages[found]
            at += region.nbytes
        return out[: len(found)]

    def write_block(self, block_id: int, data: Any) -> None:
        """Write one block from bytes as `read_block` gives them.

        Raises:
            BlockSizeError: not `block_nbytes` bytes; nothing is written.
        """
        op = "Regions.write_block"
        (i,) = self.check_ids(op, "block_id", [block_id])
        source = np.frombuffer(data, np.uint8)
        if source.size != self.block_nbytes:
            raise BlockSizeError(
                op, "data", expected=f"{self.block_nbytes} bytes", got=str(source.size)
            )
        at = 0
        for pages, region in zip(self.pages, self.regions, strict=True):
            pages[i] = source[at : at + region.nbytes]
            at += region.nbytes


def check_ids(op: str, argument: str, ids: Ids, num_blocks: int) -> "NDArray[np.int64]":
    """Block ids as an array; see `Regions.check_ids`."""
    listed = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    inside = f"integers from 0 to {num_blocks - 1}"
    try:
        found = np.fromiter((_index(i) for i in listed), np.int64, len(listed))
    except (TypeError, OverflowError) as error:
        raise BlockIdError(op, argument, expected=inside, got=str(error)) from None
    outside = (found < 0) | (found >= num_blocks)
    if outside.any():
        i = int(outside.argmax())
        raise BlockIdError(op, f"{argument}[{i}]", expected=inside, got=str(found[i]))
    values, counts = np.unique(found, return_counts=True)
    if len(values) < len(found):
        twice = values[counts > 1][0]
        raise BlockIdError(op, argument, expected="each block once", got=f"block {twice} twice")
    return found


def _index(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(repr(value))
    return int(value.__index__())


def _num_pages(spec: "CacheSpec", caches: Sequence[Any]) -> int:
    if len(caches) != spec.num_tensors:
        raise SpecMismatchError(
            "Regions", "caches", expected=f"{spec.num_tensors} tensors", got=str(len(caches))
        )
    shape = arrays.describe(caches[0], "Regions", "caches[0]").shape
    if not shape or shape[0] < 1:
        raise ShapeError("Regions", "caches[0]", expected="at least one page", got=str(list(shape)))
    return int(shape[0])


def _page_bytes(
    spec: "CacheSpec", i: int, layer: int, tensor: "TensorSpec", array: Any
) -> "NDArray[np.uint8]":
    """A tensor's memory as uint8 `[N, bytes a page]`, without a copy."""
    op, argument, name = "Regions", f"caches[{i}]", spec.layer_quant(layer).name.value
    info = arrays.describe(array, op, argument)
    if info.shape != tensor.shape:
        raise ShapeError(
            op,
            argument,
            format=name,
            expected=f"{tensor.name} {list(tensor.shape)}",
            got=str(list(info.shape)),
        )
    raw = ITEMSIZE[tensor.dtype] == 1 and info.dtype == "uint8"
    if info.dtype != tensor.dtype and not raw:
        raise DtypeError(op, argument, format=name, expected=tensor.dtype, got=info.dtype)
    if info.device != "cpu":
        raise PlacementError(op, argument, expected="a tensor on the CPU", got=info.device)
    host = arrays.to_host(array)
    if not host.flags.writeable or not info.writeable:
        raise ReadOnlyError(op, argument, format=name, expected="writeable memory", got="read-only")
    nbytes = tensor.nbytes // tensor.shape[0]
    if not host[0].flags.c_contiguous or (len(host) > 1 and host.strides[0] < nbytes):
        raise UnsupportedError(
            op,
            argument,
            format=name,
            expected=f"{tensor.name} whose pages are contiguous bytes",
            got=f"strides of {list(host.strides)} bytes",
            hint="Only the first dimension may be strided.",
        )
    # The inner dimensions are one run of memory, so neither reshape nor view copies.
    return host.reshape(len(host), -1).view(np.uint8)


def _memory(pages: "NDArray[np.uint8]") -> tuple[int, int, int]:
    count, nbytes = pages.shape
    # A single page may have any stride.
    stride = pages.strides[0] if count > 1 else nbytes
    return int(pages.__array_interface__["data"][0]), nbytes, int(stride)


def _extent(region: Region, count: int) -> tuple[int, int]:
    return region.address, region.address + region.stride * (count - 1) + region.nbytes


def _require_apart(regions: Sequence[Region], count: int) -> None:
    """No byte belongs to two parts: a write to one block would change another."""
    ends = 0
    for start, end in sorted(_extent(region, count) for region in regions):
        if start < ends:
            break
        ends = end
    else:
        return
    # Extents overlap, so look at each page: K and V of one tensor interleave, and that is fine.
    pages = np.arange(count, dtype=np.int64)
    starts = np.concatenate([region.address + region.stride * pages for region in regions])
    sizes = np.repeat([region.nbytes for region in regions], count)
    order = np.argsort(starts, kind="stable")
    overlap = starts[order][:-1] + sizes[order][:-1] > starts[order][1:]
    if overlap.any():
        i = int(overlap.argmax())
        one, other = (regions[int(at) // count].name for at in order[i : i + 2])
        raise SpecMismatchError(
            "Regions",
            "caches",
            expected="tensors that share no memory",
            got=f"{one} and {other} overlap",
        )
