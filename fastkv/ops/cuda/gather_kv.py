# SPDX-License-Identifier: Apache-2.0
"""`gather_kv` on a GPU: one launch of kernels/gather_kv.cu."""

from typing import TYPE_CHECKING, Any

from fastkv.cache import LayerCache
from fastkv.ops.cuda import jit, tensors
from fastkv.ops.cuda.launch import INT32, INT64, POINTER, completed, kernel
from fastkv.ops.cuda.plan import Plan
from fastkv.ops.cuda.tensors import CTYPE, Blob
from fastkv.quant import quant_spec

if TYPE_CHECKING:
    from fastkv.contracts.tensors import Checker

# The parameter struct's first pointers, which the kernel reads or writes in vectors.
_ALIGNED = ("cache.k", "cache.v", "out_k", "out_v", *tensors.STATIC_ARGUMENTS)
_OTHERS = 6
_WARPS = 8  # of a block, a row each


def gather_kv(
    checker: "Checker",
    cache: LayerCache,
    *,
    cache_seqlens: Any,
    block_table: Any,
    cu_seqlens_k: Any,
    out_k: Any,
    out_v: Any,
) -> None:
    """Write the cached tokens of every request with a segment into `out_k` and `out_v`."""
    plan: Plan = checker.prepared
    if plan is None:
        batch = {"cache_seqlens": cache_seqlens, "cu_seqlens_k": cu_seqlens_k}
        tensors.require_contiguous(checker, batch)
        outs = {"out_k": out_k, "out_v": out_v}
        plan = checker.prepared = _prepare(checker, cache, block_table, outs)
    static = cache.static or tensors.NO_STATIC
    aligned: tuple[Any, ...] = (cache.k, cache.v, out_k, out_v)
    aligned += (static.k_dequant, static.v_dequant, static.k_zp, static.v_zp)
    others = (cache.k_scale, cache.v_scale, cache_seqlens, block_table, cu_seqlens_k)
    addresses = plan.addresses(aligned + others)
    tensors.require_aligned(checker, _ALIGNED, addresses)
    plan.launch(checker, plan.stream(), addresses)


def _prepare(checker: "Checker", cache: LayerCache, block_table: Any, outs: dict[str, Any]) -> Plan:
    sizes = checker.sizes
    dim = tensors.require_head_dim(checker, 8)
    strides = tensors.cache_strides(checker, cache)
    for name, out in outs.items():
        strides += tensors.row_strides(checker, name, out)
    table_strides, table_sizes = tensors.table_shape(checker, block_table)
    constants = Blob.of(
        (INT64, strides + table_strides), (INT32, [*table_sizes, sizes["Tk"], sizes["Hkv"]])
    )
    storage = cache.spec.storage_dtype(cache.layer_id)
    defines = {
        **tensors.cache_defines(checker, cache),
        **tensors.static_defines(checker, cache, "dequant"),
        **_shape_defines(storage, checker.dtype("out_k"), dim, sizes["Hkv"]),
    }
    index = tensors.device_index(checker)
    what = jit.Specialization.of("gather_kv", **defines)
    return Plan(
        kernel(what, index, _fields(constants.field), 32 * _WARPS),
        -(-sizes["Tk"] // _WARPS),
        tensors.library(checker),
        constants.packed,
    )


def _shape_defines(storage: str, out: str, dim: int, heads: int) -> dict[str, object]:
    """A lane holds as many chunks of eight elements as its share of a row, 8 at most."""
    most = 4 if storage == "float32" else 8
    unroll = min(most, -(-2 * heads * dim // (8 * 32)))
    return {"out": CTYPE[out], "head_dim": dim, "warps": _WARPS, "unroll": unroll}


def _fields(constants: str) -> tuple[str, ...]:
    return (*(POINTER,) * (len(_ALIGNED) + _OTHERS), constants)


def specializations() -> list[jit.Specialization]:
    """Representatives of every class, for a compile check without a GPU."""
    return [
        _example("none", "bfloat16", 128),
        _example("none", "float16", 64, storage="float16"),
        _example("none", "float32", 256, storage="float32"),
        _example("cache_int8", "bfloat16", 128),
        _example("cache_int8", "float32", 96, per_channel=1),
        _example("cache_fp8", "bfloat16", 128),
        _example("cache_int4_zp", "bfloat16", 128, per_channel=1),
        _example("cache_int4_zp", "float16", 256, per_channel=1),
        _example("block_wise_fp8", "bfloat16", 128),
        _example("block_wise_fp8", "float16", 64, scale_dtype="float16"),
    ]


def _example(
    quant: str,
    out: str,
    dim: int,
    *,
    storage: str = "bfloat16",
    scale_dtype: str = "float32",
    per_channel: int = 0,
) -> jit.Specialization:
    row = quant_spec(quant)
    static = {"static": "float", "per_channel": per_channel} if row.needs_static else {}
    defines = {
        **tensors.codec_defines(row, storage, scale_dtype),
        **static,
        **_shape_defines(row.storage or storage, out, dim, 8),
    }
    return completed(jit.Specialization.of("gather_kv", **defines), _fields(_EXAMPLE_BLOB))


_EXAMPLE_BLOB = Blob.of((INT64, [0] * 18), (INT32, [0] * 6)).field
