# SPDX-License-Identifier: Apache-2.0
"""Launches kernels/paged_attention.cu."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastkv.ops.cuda import faults, jit, serve, tensors
from fastkv.ops.cuda.launch import FLOAT, INT32, POINTER, Kernel
from fastkv.ops.cuda.workspace import workspace

if TYPE_CHECKING:
    from fastkv.cache import LayerCache
    from fastkv.contracts.tensors import Checker
    from fastkv.quant import QuantSpec

THREADS = 128
_WARPS = 4
# The split of a request over blocks: chunks of at least so many tokens, and about so many chunks
# times KV heads. Part of the arithmetic: another split rounds otherwise.
LEAST_CHUNK = 512
SPLIT = 256
_GROUP = 16  # chunks whose states fold first; kernels/paged/params.cuh has it too
_NO_WINDOW = 0x7FFFFFFF
_ALIGNED = ("q", "out", "cache.k", "cache.v")
_SCALARS = (INT32,) * 3 + (FLOAT,) * 2 + (INT32,)


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
    def of(cls, quant: "QuantSpec", dim: int, rows: int) -> "Shape":
        """For a format, a head dim, and so many query rows of a KV head a request."""
        columns = 1 if rows <= 8 else 2 if rows <= 16 or dim > 128 else 4
        bits = 16 if quant.bound is None else 8 // quant.elements_per_item
        fixed = _shared_struct(dim, columns)
        stage = _WARPS * 2 * (16 if bits == 16 else 32) * _pitch(bits * dim // 8)
        for blocks in (*range(BLOCKS[bits] if columns == 1 else 2, 1, -1), 1):
            stages = min(STAGES, (_SHARED // blocks - _RESERVED - fixed) // stage)
            if stages >= 2:
                return cls(columns, stages, blocks, fixed + stages * stage)
        raise AssertionError(f"no shape for head dim {dim} in {quant.name}")


# Blocks a multiprocessor, at most, by bits of an element; fewer where two stages do not fit.
BLOCKS = {16: 2, 8: 2, 4: 3}
# Stages at most: about 48 KiB a multiprocessor must be in flight.
STAGES = 4
# Bytes of shared memory: of an sm_90 multiprocessor, and what each block loses of it.
_SHARED = 228 * 1024
_RESERVED = 1024


def _pitch(row: int) -> int:
    """Bytes from one token's row to the next in shared memory: an odd multiple of 16."""
    return (row // 16 | 1) * 16


def _shared_struct(dim: int, columns: int) -> int:
    """At least `kSharedBytes` of kernels/paged/shared.cuh, which asserts it."""
    rows = 8 * columns
    query = dim // 16 * columns * 32 * 8
    parts = max(4 * (4 if columns == 4 or dim > 128 else 8) * (dim + 4) * 4, 5 * _GROUP * rows * 4)
    fold = 4 * rows * dim + 6 * rows * 12 + 5 * rows * 4 + 8 * dim
    return query + parts + fold + 8 * _WARPS * STAGES + 8 * _GROUP + 512


class Prepared:
    """What stays the same for calls of one metadata: kernel, strides, sizes, workspace."""

    def __init__(
        self, checker: "Checker", cache: "LayerCache", q: Any, out: Any, block_table: Any, rest: Any
    ) -> None:
        serve.require_served(checker, cache, tensors.device_index(checker))
        sizes = checker.sizes
        dim, heads = tensors.require_head_dim(checker, 32), sizes["Hkv"]
        group = sizes["Hq"] // heads
        tensors.require_contiguous(checker, rest)
        tokens = -(-sizes["T"] // max(1, sizes["B"]))
        shape = Shape.of(cache.quant, dim, tokens * group)
        self.index = tensors.device_index(checker)
        self.library = checker.first.library if checker.first else ""
        self.on_device = tensors.library(checker)
        self.static = tensors.static_names(cache.quant, "dequant")
        groups = -(-SPLIT // (heads * _GROUP))
        blob = self._blob(checker, cache, q, out, block_table, groups)
        self.blob = blob.packed
        what = jit.Specialization.of(
            "paged_attention",
            **tensors.cache_defines(checker, cache),
            **tensors.static_defines(checker, cache, "dequant"),
            **_defines(tensors.CTYPE[checker.dtype("q")], dim, shape),
        )
        fields = (POINTER,) * 19 + (blob.field, *_SCALARS)
        self.kernel = Kernel(what, self.index, fields, THREADS, shape.shared)
        self.scale = dim**-0.5
        self.fresh = int(not checker.given("out"))
        most = (sizes["T"] * group // (8 * shape.columns) + sizes["B"]) * heads * groups * _GROUP
        self.grid = max(1, min(self.kernel.resident_blocks(), most))
        state = 4 * (8 * shape.columns * dim + 3 * 8 * shape.columns)
        self.states = self.grid * (_GROUP + 2 * groups) * state
        self.counters = 8 * self.grid

    @staticmethod
    def _blob(
        checker: "Checker", cache: "LayerCache", q: Any, out: Any, block_table: Any, groups: int
    ) -> tensors.Blob:
        sizes = checker.sizes
        rows = tensors.row_strides(checker, "q", q)
        made = (sizes["Hq"] * sizes["D"], sizes["D"])
        rows += tensors.row_strides(checker, "out", out) if checker.given("out") else made
        table, counts = tensors.table_shape(checker, block_table)
        heads = sizes["Hkv"]
        return tensors.Blob.of(
            ("q", [*tensors.cache_strides(checker, cache), *table]),
            ("i", counts),
            ("q", rows),
            ("i", [sizes["T"], heads, sizes["Hq"] // heads, groups]),
        )


def _defines(q: str, dim: int, shape: Shape) -> dict[str, object]:
    return {
        "q": q,
        "d": dim,
        "columns": shape.columns,
        "stages": shape.stages,
        "blocks": shape.blocks,
        "shared_bytes": shape.shared,
        "least_chunk": LEAST_CHUNK,
        "split": SPLIT,
    }


def paged_attention(
    checker: "Checker",
    q: Any,
    cache: "LayerCache",
    *,
    cu_seqlens_q: Any,
    cache_seqlens: Any,
    block_table: Any,
    scale: float | None,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    sinks: Any,
    mask_offsets: Any,
    out: Any,
    lse: Any,
) -> None:
    """Write `out`, and `lse` where it is given; see `fastkv.ops.paged_attention`."""
    prepared: Prepared = checker.prepared
    if prepared is None:
        small = {"cu_seqlens_q": cu_seqlens_q, "cache_seqlens": cache_seqlens}
        small |= {"mask_offsets": mask_offsets, "sinks": sinks}
        prepared = checker.prepared = Prepared(checker, cache, q, out, block_table, small)
    on_device, index = prepared.on_device, prepared.index
    stream, pointer = on_device.stream(index), on_device.pointer
    space = workspace(
        on_device, prepared.library, index, stream, prepared.states, prepared.counters
    )
    fault = faults.word(index, stream)
    aligned = pointer(q), pointer(out), pointer(cache.k), pointer(cache.v)
    tensors.require_aligned(checker, _ALIGNED, aligned)
    at_q, at_out, at_k, at_v = aligned
    prepared.kernel.launch(
        stream,
        prepared.grid,
        at_q,
        at_out,
        0 if lse is None else pointer(lse),
        at_k,
        at_v,
        0 if cache.k_scale is None else pointer(cache.k_scale),
        0 if cache.v_scale is None else pointer(cache.v_scale),
        *tensors.static_pointers(cache, prepared.static, pointer),
        pointer(cu_seqlens_q),
        pointer(cache_seqlens),
        pointer(block_table),
        0 if mask_offsets is None else pointer(mask_offsets),
        0 if sinks is None else pointer(sinks),
        space.states,
        space.counters,
        fault,
        prepared.blob,
        int(causal),
        _NO_WINDOW if window is None else min(window, _NO_WINDOW),
        prepared.fresh,
        prepared.scale if scale is None else scale,
        soft_cap or 0.0,
        0,
    )
    if fault:
        faults.raise_noted(checker, fault, stream)
