# SPDX-License-Identifier: Apache-2.0
"""One checksum a block, over the bytes of all its regions: xxh3_64.

It finds what transfers and stores do to bytes by accident. It is no defence against a peer that
forges data.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.optional import require
from fastkv.transfer.regions import Ids, Regions

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Small parts of blocks are gathered and then hashed: a call a part would cost more than copying it.
# What is gathered at once stays within a core's cache.
_AT_ONCE = 1 << 20
# Bytes of a part, on average, from which hashing it where it lies is the faster way.
_LARGE = 4096


def _hash() -> Any:
    return require("xxhash", "A checksum of a block", "pip install 'fastkv[transfer]'")


def checksum(data: Any) -> int:
    """xxh3_64 of a block's bytes, as `Regions.read_block` gives them."""
    digest: int = _hash().xxh3_64_intdigest(data)
    return digest


def checksums(regions: Regions, ids: Ids) -> "NDArray[np.uint64]":
    """xxh3_64 of each block, uint64 `[len(ids)]`.

    Raises:
        BlockIdError: as in `Regions.check_ids`.
        MissingDependencyError: xxhash is not installed.
    """
    found = regions.check_ids("checksums", "ids", ids)
    return np.fromiter(_each(regions, found), np.uint64, len(found))


def _each(regions: Regions, ids: "NDArray[np.int64]") -> Iterator[int]:
    if regions.block_nbytes >= _LARGE * len(regions.regions):
        for i in ids:
            yield _in_place(regions.pages, i)
        return
    digest = _hash().xxh3_64_intdigest
    step = max(1, _AT_ONCE // regions.block_nbytes)
    buffer = np.empty((min(step, len(ids)), regions.block_nbytes), np.uint8)
    for at in range(0, len(ids), step):
        yield from map(digest, regions.read_blocks(ids[at : at + step], buffer))


def _in_place(pages: "Sequence[NDArray[np.uint8]]", i: "np.int64") -> int:
    state = _hash().xxh3_64()
    for region in pages:
        state.update(region[i])
    digest: int = state.intdigest()
    return digest
