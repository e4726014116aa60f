# SPDX-License-Identifier: Apache-2.0
"""How kernels/masked_attention.cu uses a multiprocessor: threads, shared memory, tiles.

The kernel has the same numbers and asserts the bytes.
"""

from dataclasses import dataclass

from fastkv.ops.cuda import jit

#: Query rows of a tile, all of one query head: a block's unit of work.
ROWS = 128
_ITEM = 2  # bytes of an element of q, K and V
# Columns of a row in shared memory come in multiples of this, one period of the swizzle.
_COLUMNS = 64
# Tiles of K and of V that a block holds at once: a multiply-while-loading ring, or one of each.
_RING, _PAIR = 4, 2
# What the ring needs beside its tiles: room to align them to the swizzle's 1024 bytes; barriers.
_ALIGNMENT, _BARRIERS = 1024, 256


@dataclass(frozen=True, slots=True)
class Shape:
    """How a specialization uses a multiprocessor.

    Attributes:
        warpgroups: 1 where warpgroups multiply out of shared memory, 0 where warps do out of
            registers.
        keys: of a tile of K or V.
        threads: of a block: a warpgroup that loads and two that multiply, or four or eight warps.
        shared: bytes of dynamic shared memory of a block.
    """

    warpgroups: int
    keys: int
    threads: int
    shared: int

    @classmethod
    def of(cls, dim: int, arch: str) -> "Shape":
        """For a head dim and an architecture as `jit.arch_of` names it."""
        columns = -(-dim // _COLUMNS) * _COLUMNS
        wide = columns > 128
        query = ROWS * columns * _ITEM
        if arch == jit.WARPGROUPS_ARCH:
            keys = 64 if wide else 128
            tiles = _RING * keys * columns * _ITEM
            return cls(1, keys, 384, _ALIGNMENT + query + tiles + _BARRIERS)
        keys, threads = (32, 256) if wide else (64, 128)
        return cls(0, keys, threads, query + _PAIR * keys * columns * _ITEM)


def most_tiles(tokens: int, requests: int, query_heads: int) -> int:
    """Tiles of a batch at most, from shapes alone: each request may fill its last one in part.

    Args:
        tokens: T.
        requests: B.
        query_heads: Hq.
    """
    return (tokens // ROWS + requests) * query_heads
