# SPDX-License-Identifier: Apache-2.0
"""Launches kernels/paged_attention.cu."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkv.ops.cuda import jit, serve, tensors
from fastkv.ops.cuda.launch import FLOAT, INT32, INT64, POINTER, completed, kernel
from fastkv.ops.cuda.paged_shape import GROUP, LEAST_CHUNK, SPLIT, Shape, row_bytes
from fastkv.ops.cuda.plan import Plan
from fastkv.ops.cuda.workspace import workspace
from fastkv.quant import quant_spec

if TYPE_CHECKING:
    from fastkv.cache import LayerCache
    from fastkv.contracts.tensors import Checker

_NO_WINDOW = 0x7FFFFFFF
_ALIGNED = ("q", "out", "cache.k", "cache.v")
_POINTERS = (POINTER,) * 19
_SCALARS = (INT32,) * 3 + (FLOAT,) * 2 + (INT32,)
# The kernel multiplies a page id or a slot by the stride in 64 bits, the stride itself in 32.
_LARGEST_STRIDE = 1 << 27


class _Prepared(NamedTuple):
    """What a call's metadata decides beside its plan.

    Attributes:
        plan: kernel, grid and constants.
        library: name of the call's library.
        workspace: bytes of states and of counters.
        scale: where none is given.
        fresh: whether the op made `out`, so that the kernel must write all of its rows.
    """

    plan: Plan
    library: str
    workspace: tuple[int, int]
    scale: float
    fresh: int


def _prepare(
    checker: "Checker", cache: "LayerCache", q: Any, out: Any, block_table: Any, small: Any
) -> _Prepared:
    """Refuse what the kernel does not serve; compile; size grid and workspace."""
    index = tensors.device_index(checker)
    serve.require_served(checker, cache, index)
    sizes = checker.sizes
    dim, heads = tensors.require_head_dim(checker, 32), sizes["Hkv"]
    group = sizes["Hq"] // heads
    tensors.require_contiguous(checker, small)
    tokens = -(-sizes["T"] // max(1, sizes["B"]))
    shape = _shape(checker, cache, dim, tokens * group, index)
    groups = -(-SPLIT // (heads * GROUP))
    strides = tensors.cache_strides(checker, cache)
    blob = _constants(checker, strides, q, out, block_table, groups)
    what = jit.Specialization.of(
        "paged_attention",
        **tensors.cache_defines(checker, cache),
        **tensors.static_defines(checker, cache, "dequant"),
        **_defines(tensors.CTYPE[checker.dtype("q")], dim, shape, _dense(cache, dim, strides)),
    )
    fields = (*_POINTERS, blob.field, *_SCALARS)
    made = kernel(what, index, fields, 32 * shape.warps, shape.shared)
    most = (sizes["T"] * group // (8 * shape.columns) + sizes["B"]) * heads * groups * GROUP
    grid = max(1, min(made.resident_blocks, most))
    state = 4 * (8 * shape.columns * dim + 3 * 8 * shape.columns)
    return _Prepared(
        Plan(made, grid, tensors.library(checker), blob.packed),
        checker.first.library if checker.first else "",
        workspace=(grid * (GROUP + 2 * groups) * state, 8 * grid),
        scale=dim**-0.5,
        fresh=int(not checker.given("out")),
    )


def _constants(
    checker: "Checker", strides: list[int], q: Any, out: Any, block_table: Any, groups: int
) -> tensors.Blob:
    sizes = checker.sizes
    rows = tensors.query_strides(checker, q, out)
    table, counts = tensors.table_shape(checker, block_table)
    heads = sizes["Hkv"]
    if max(strides) >= _LARGEST_STRIDE:
        expected = f"page, head and slot strides below {_LARGEST_STRIDE} bytes on a GPU"
        raise tensors.unsupported(checker, "cache.k", expected, strides)
    return _blob(strides, table, counts, rows, [sizes["T"], heads, sizes["Hq"] // heads, groups])


def _blob(
    strides: Sequence[int],
    table: Sequence[int],
    counts: Sequence[int],
    rows: Sequence[int],
    sizes: Sequence[int],
) -> tensors.Blob:
    return tensors.Blob.of(
        (INT64, [*strides, *table]), (INT32, counts), (INT64, rows), (INT32, sizes)
    )


def _shape(checker: "Checker", cache: "LayerCache", dim: int, rows: int, index: int) -> Shape:
    facts = jit.device_facts(index)
    found = Shape.of(cache.quant, dim, rows, facts.shared_per_multiprocessor)
    if found is None:
        expected = f"more shared memory than sm_{facts.sm} has for this head dim and format"
        raise tensors.unsupported(checker, "D", expected, dim)
    return found


def _dense(cache: "LayerCache", dim: int, strides: Sequence[int]) -> int:
    """Bytes of a token's row where K's and V's follow each other without a gap, else 0."""
    row = row_bytes(cache.quant, dim)
    return row if strides[2] == strides[8] == row else 0


def _defines(q: str, dim: int, shape: Shape, slot: int) -> dict[str, object]:
    return {
        "q": q,
        "d": dim,
        "columns": shape.columns,
        "stages": shape.stages,
        "blocks": shape.blocks,
        "shared_bytes": shape.shared,
        "least_chunk": LEAST_CHUNK,
        "split": SPLIT,
        "warps": shape.warps,
        "slot_bytes": slot,
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
    prepared: _Prepared = checker.prepared
    if prepared is None:
        small = {"cu_seqlens_q": cu_seqlens_q, "cache_seqlens": cache_seqlens}
        small |= {"mask_offsets": mask_offsets, "sinks": sinks}
        prepared = checker.prepared = _prepare(checker, cache, q, out, block_table, small)
    plan, static = prepared.plan, cache.static or tensors.NO_STATIC
    paged: tuple[Any, ...] = (q, out, lse, cache.k, cache.v, cache.k_scale, cache.v_scale)
    paged += (static.k_dequant, static.v_dequant, static.k_zp, static.v_zp)
    paged += (cu_seqlens_q, cache_seqlens, block_table, mask_offsets, sinks)
    addresses = plan.addresses(paged)
    _require_aligned(checker, addresses)
    stream = plan.stream()
    space = workspace(
        plan.on_device, prepared.library, plan.kernel.index, stream, *prepared.workspace
    )
    addresses += (space.states, space.counters)
    plan.launch(
        checker,
        stream,
        addresses,
        int(causal),
        _NO_WINDOW if window is None else min(window, _NO_WINDOW),
        prepared.fresh,
        prepared.scale if scale is None else scale,
        soft_cap or 0.0,
        0,
    )


def _require_aligned(checker: "Checker", addresses: Sequence[int]) -> None:
    q, out, _, k, v = addresses[:5]
    if (q | out | k | v) % tensors.VECTOR:
        tensors.require_aligned(checker, _ALIGNED, (q, out, k, v))
    tensors.require_mask_aligned(checker, addresses[-2])


# sm_90 and sm_89: what a multiprocessor has.
_LARGE, _SMALL = 228 * 1024, 100 * 1024
# Format, dtype of q, D, query rows, storage of `none`, static multipliers per channel, memory.
_EXAMPLES = (
    ("none", "bfloat16", 128, 4, "bfloat16", 0, _LARGE),
    ("none", "float16", 64, 32, "float16", 0, _SMALL),
    ("cache_int8", "bfloat16", 128, 4, "", 0, _LARGE),
    ("cache_int8", "float16", 96, 16, "", 1, _SMALL),
    ("cache_fp8", "bfloat16", 128, 4, "", 0, _LARGE),
    ("cache_fp8", "bfloat16", 64, 4, "", 0, _SMALL),
    ("cache_int4_zp", "bfloat16", 128, 4, "", 1, _LARGE),
    ("cache_int4_zp", "float16", 128, 16, "", 1, _SMALL),
    ("block_wise_fp8", "bfloat16", 128, 4, "", 0, _LARGE),
    ("block_wise_fp8", "float32", 64, 16, "", 0, _SMALL),
)


def specializations() -> list[jit.Specialization]:
    """Representatives of every class, for `fastkv.ops.cuda.listing`."""
    return [_example(*example) for example in _EXAMPLES]


def _example(
    quant: str, q: str, dim: int, rows: int, storage: str, per_channel: int, memory: int
) -> jit.Specialization:
    row = quant_spec(quant)
    shape = Shape.of(row, dim, rows, memory)
    slot = row_bytes(row, dim) if memory == _LARGE else 0  # either kind of cache has an example
    assert shape is not None, "examples fit"
    static = {"static": "float", "per_channel": per_channel} if row.needs_static else {}
    defines = tensors.codec_defines(row, storage, "float32") | static
    what = jit.Specialization.of(
        "paged_attention", **defines, **_defines(tensors.CTYPE[q], dim, shape, slot)
    )
    blob = _blob([0] * 12, [0] * 2, [0] * 4, [0] * 4, [0] * 4)
    return completed(what, (*_POINTERS, blob.field, *_SCALARS))
