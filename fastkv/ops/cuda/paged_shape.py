# SPDX-License-Identifier: Apache-2.0
"""How kernels/paged_attention.cu uses a multiprocessor: query rows a block, stages, blocks.

None of it changes a result: rows are independent, and the split over keys is `LEAST_CHUNK` and
`SPLIT` alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastkv.quant import QuantSpec

WARPS = 4
THREADS = 32 * WARPS
GROUP = 16  # chunks whose states fold first; kernels/paged/params.cuh has it too
# The split of a request over blocks: chunks of at least so many tokens, and about so many chunks
# times KV heads. Part of the arithmetic: another split rounds otherwise.
LEAST_CHUNK = 512
SPLIT = 256
# Blocks a multiprocessor, at most, by bits of an element; fewer where two stages do not fit.
BLOCKS = {16: 2, 8: 2, 4: 3}
TILE = {16: 16, 8: 32, 4: 32}
MANY = 2
# Stages at most: about 48 KiB a multiprocessor must be in flight.
STAGES = 4
# Bytes of shared memory that the driver takes of each block.
_RESERVED = 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """How a specialization uses a multiprocessor.

    Attributes:
        columns: 8 query rows each.
        stages: tiles that a warp has in shared memory.
        blocks: resident blocks that the compiler leaves registers for.
        shared: bytes of shared memory of a block.
    """

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
        row = row_bytes(quant, dim)
        bits = 8 * row // dim
        fixed = _shared_struct(dim, columns, row)
        stage = WARPS * 2 * TILE[bits] * _pitch(row)
        most = BLOCKS[bits] if columns == 1 else MANY
        for blocks in range(most, 0, -1):
            stages = min(STAGES, (memory // blocks - _RESERVED - fixed) // stage)
            if stages >= 2:
                return cls(columns, stages, blocks, fixed + stages * stage)
        return None


def row_bytes(quant: "QuantSpec", dim: int) -> int:
    """Bytes of one token's K of one head."""
    return 2 * dim if quant.bound is None else dim // quant.elements_per_item


def _pitch(row: int) -> int:
    """Bytes from one token's row to the next in shared memory: `kPitch` of kernels/paged/shared.cuh."""
    pieces = row // 16
    return row if pieces & (pieces - 1) == 0 else (pieces | 1) * 16


def _shared_struct(dim: int, columns: int, row: int) -> int:
    """At least `kSharedBytes` of kernels/paged/shared.cuh, which asserts it."""
    rows = 8 * columns
    query = dim // 16 * columns * 32 * 8
    fold = 4 * rows * max(dim, 5 * GROUP) + (2 + WARPS) * rows * 12 + 5 * rows * 4 + 16 * dim
    fixed = query + fold + 8 * WARPS * STAGES + 8 * GROUP + 320
    alignment = max(128, row)
    return -(-fixed // alignment) * alignment
