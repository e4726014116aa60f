# SPDX-License-Identifier: Apache-2.0
"""How kernels/paged_attention.cu uses a multiprocessor: warps, query rows, stages, blocks.

A result depends on the split over keys, `LEAST_CHUNK` and `SPLIT`, and on the warps of a block,
which share a chunk: one number for all batches of a format and head dim on a device. The rest
changes none: rows are independent.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastkv.quant import QuantSpec

GROUP = 16  # chunks whose states fold first; kernels/paged/params.cuh has it too
# The split of a request over blocks: chunks of at least so many tokens, and about so many chunks
# times KV heads. Part of the arithmetic: another split rounds otherwise.
LEAST_CHUNK = 512
SPLIT = 256
# By bits of an element. Tokens of a tile: `kTile` of kernels/fragments/.
TILE = {16: 16, 8: 32, 4: 32}
# Warps of a block. Eight where a tile is quickly multiplied: a chunk is done in half the time.
WARPS = {16: 8, 8: 4, 4: 4}
# Blocks a multiprocessor, at most, for one column of query rows and for several: eight warps are
# wanted, twelve for int4; fewer where two stages do not fit.
BLOCKS = {16: (1, 1), 8: (2, 2), 4: (3, 2)}
# Stages at most: about 48 KiB a multiprocessor must be in flight.
STAGES = 4
# Bytes of shared memory that the driver takes of each block.
_RESERVED = 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """How a specialization uses a multiprocessor.

    Attributes:
        warps: of a block.
        columns: 8 query rows each.
        stages: tiles that a warp has in shared memory.
        blocks: resident blocks that the compiler leaves registers for.
        shared: bytes of shared memory of a block.
    """

    warps: int
    columns: int
    stages: int
    blocks: int
    shared: int

    @classmethod
    def of(cls, quant: "QuantSpec", dim: int, rows: int, memory: int) -> "Shape | None":
        """For a format, a head dim, and so many query rows of a KV head a request.

        Args:
            quant: the format.
            dim: D.
            rows: query rows of a KV head, of an average request.
            memory: bytes of shared memory of a multiprocessor.

        Returns:
            None where a block does not fit in the memory.
        """
        wanted = 1 if rows <= 8 else 2 if rows <= 16 or dim > 128 else 4
        for columns in (4, 2, 1):
            found = cls._with(quant, dim, columns, memory) if columns <= wanted else None
            if found is not None:
                return found
        return None

    @classmethod
    def _with(cls, quant: "QuantSpec", dim: int, columns: int, memory: int) -> "Shape | None":
        bits = 8 * row_bytes(quant, dim) // dim
        warps = _warps(quant, dim, memory)
        most = BLOCKS[bits][columns > 1] * WARPS[bits] // warps
        fixed, stage = _shared_struct(quant, dim, columns, warps), _stage(quant, dim, warps)
        for blocks in range(most, 0, -1):
            stages = min(STAGES, (memory // blocks - _RESERVED - fixed) // stage)
            if stages >= 2:
                return cls(warps, columns, stages, blocks, fixed + stages * stage)
        return None


def _warps(quant: "QuantSpec", dim: int, memory: int) -> int:
    """Warps of a block, whatever the query rows."""
    wanted = WARPS[8 * row_bytes(quant, dim) // dim]
    most_fixed = _shared_struct(quant, dim, 4, wanted)
    fits = most_fixed + 2 * _stage(quant, dim, wanted) <= memory - _RESERVED
    return wanted if fits else 4


def row_bytes(quant: "QuantSpec", dim: int) -> int:
    """Bytes of one token's K of one head."""
    return 2 * dim if quant.bound is None else dim // quant.elements_per_item


def _pitch(row: int) -> int:
    """Bytes from one token's row to the next: `kPitch` of kernels/paged/shared.cuh."""
    pieces = row // 16
    return row if pieces & (pieces - 1) == 0 else (pieces | 1) * 16


def _stage(quant: "QuantSpec", dim: int, warps: int) -> int:
    """Bytes of one tile of K and V a warp, and of their scales."""
    row = row_bytes(quant, dim)
    tokens = TILE[8 * row // dim]
    return warps * (2 * tokens * _pitch(row) + (256 if quant.needs_paged_scales else 0))


def _shared_struct(quant: "QuantSpec", dim: int, columns: int, warps: int) -> int:
    """At least `kSharedBytes` of kernels/paged/shared.cuh without scales, which asserts it."""
    rows = 8 * columns
    query = dim // 16 * columns * 32 * 8
    nodes = (5 if quant.needs_paged_scales else 3) * GROUP + 2
    fold = 4 * rows * max(dim, nodes) + (2 + warps) * rows * 12 + 5 * rows * 4
    fixed = query + fold + (16 * dim if quant.needs_static else 16)
    fixed += 8 * warps * STAGES + 12 * warps + 8 * GROUP + 224
    alignment = max(128, row_bytes(quant, dim))
    return -(-fixed // alignment) * alignment
