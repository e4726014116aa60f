# SPDX-License-Identifier: Apache-2.0
"""`rope_write_kv` on a GPU: one launch of kernels/rope_write_kv.cu."""

from typing import TYPE_CHECKING, Any, NamedTuple

from fastkv.cache import LayerCache
from fastkv.ops.cuda import jit, tensors
from fastkv.ops.cuda.launch import FLOAT, INT32, INT64, POINTER, Kernel, completed, kernel
from fastkv.ops.cuda.plan import Plan
from fastkv.ops.cuda.tensors import CTYPE, Blob
from fastkv.quant import quant_spec
from fastkv.rope import Rope

if TYPE_CHECKING:
    from fastkv.contracts.tensors import Checker

# The parameter struct's first pointers, which the kernel reads in vectors.
_ALIGNED = (
    *("qkv", "q", "cache.k", "cache.v", "rope.cos", "rope.sin", "q_norm_weight", "k_norm_weight"),
    *tensors.STATIC_ARGUMENTS,
    *("k", "v", "out_k", "out_v"),
)
_OTHERS = 7
_LARGEST_HEAD_DIM = 512
_MOST_WARPS = 8
# Threads of a multiprocessor at once: 640 with 96 bytes of qkv under way each are 60 KB, and 96
# registers each spill nothing.
_RESIDENT = 640


class _Options(NamedTuple):
    """What the contract does not see of a call, and so the checker is not remembered by."""

    norm_after_rope: bool
    return_kv: bool
    interleaved: bool


def rope_write_kv(
    checker: "Checker",
    qkv: Any,
    cache: LayerCache,
    *,
    cu_seqlens_q: Any,
    cache_seqlens: Any,
    block_table: Any,
    rope: Rope | None,
    q_norm_weight: Any,
    k_norm_weight: Any,
    norm_eps: float,
    norm_after_rope: bool,
    q: Any,
    k: Any,
    v: Any,
    out_k: Any,
    out_v: Any,
    cu_seqlens_k: Any,
) -> None:
    """Write the cache, `q` and, where given, `k`, `v`, `out_k` and `out_v`."""
    options = (bool(norm_after_rope), k is not None, rope is not None and bool(rope.interleaved))
    plans: dict[tuple[bool, ...], Plan] = checker.prepared or {}
    plan = plans.get(options)
    if plan is None:
        plan = _prepare(
            checker,
            cache,
            _Options(*options),
            {"cu_seqlens_q": cu_seqlens_q, "cache_seqlens": cache_seqlens},
            {"q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight},
            {} if out_k is None else {"out_k": out_k, "out_v": out_v},
            {"qkv": qkv, "block_table": block_table, "cu_seqlens_k": cu_seqlens_k},
            rope,
            norm_eps,
        )
        checker.prepared = plans | {options: plan}
    static = cache.static or tensors.NO_STATIC
    cos, sin = (None, None) if rope is None else (rope.cos, rope.sin)
    aligned: tuple[Any, ...] = (qkv, q, cache.k, cache.v, cos, sin, q_norm_weight, k_norm_weight)
    aligned += (static.k_quant, static.v_quant, static.k_zp, static.v_zp, k, v, out_k, out_v)
    others = (cache.k_scale, cache.v_scale, cu_seqlens_q, cache_seqlens, block_table, cu_seqlens_k)
    addresses = plan.addresses(aligned + others)
    tensors.require_aligned(checker, _ALIGNED, addresses)
    plan.launch(checker, plan.stream(), addresses)


def _prepare(
    checker: "Checker",
    cache: LayerCache,
    options: _Options,
    batch: dict[str, Any],
    weights: dict[str, Any],
    outs: dict[str, Any],
    others: dict[str, Any],
    rope: Rope | None,
    norm_eps: float,
) -> Plan:
    """Refuse what the kernel does not serve; compile."""
    sizes = checker.sizes
    dim = tensors.require_head_dim(checker, 16, _LARGEST_HEAD_DIM)
    tensors.require_contiguous(checker, batch | weights | {"cu_seqlens_k": others["cu_seqlens_k"]})
    rotary_dim = 0 if rope is None else 2 * sizes["rotary_dim/2"]
    defines = {
        **tensors.cache_defines(checker, cache),
        **tensors.static_defines(checker, cache, "quant"),
        **_shape_defines(checker.dtype("qkv"), dim, sizes["Hq"] + 2 * sizes["Hkv"]),
        **_rope_defines(rotary_dim, options.interleaved),
        **_norm_defines(checker, weights, options.norm_after_rope),
        "return_kv": int(options.return_kv),
        "has_out": int(bool(outs)),
    }
    if outs:
        defines["out"] = CTYPE[checker.dtype("out_k")]
    constants = _constants(checker, cache, others, rope, outs, norm_eps)
    index = tensors.device_index(checker)
    made = _kernel(defines, constants.field, index)
    return Plan(made, sizes["T"], tensors.library(checker), constants.packed)


def _constants(
    checker: "Checker",
    cache: LayerCache,
    others: dict[str, Any],
    rope: Rope | None,
    outs: dict[str, Any],
    norm_eps: float,
) -> Blob:
    """The parameter struct from `qkv_row` on."""
    sizes = checker.sizes
    rows = list(tensors.row_strides(checker, "qkv", others["qkv"]))
    rows += _rope_strides(checker, rope)
    out_strides = [
        stride for name, out in outs.items() for stride in tensors.row_strides(checker, name, out)
    ]
    table_strides, table_sizes = tensors.table_shape(checker, others["block_table"])
    counts = [sizes["T"], sizes["Hq"], sizes["Hkv"], sizes.get("max_len", 0), sizes.get("Tk", 0)]
    strides = rows + tensors.cache_strides(checker, cache) + (out_strides or [0] * 4)
    return Blob.of(
        (INT64, strides + table_strides), (INT32, table_sizes + counts), (FLOAT, [norm_eps])
    )


def _rope_strides(checker: "Checker", rope: Rope | None) -> list[int]:
    if rope is None:
        return [0, 0]
    sizes = checker.sizes
    if not sizes["max_len"]:
        raise tensors.unsupported(checker, "rope.cos", "at least one position on a GPU", 0)
    unit = 4 if sizes["rotary_dim/2"] % 4 else tensors.VECTOR
    tables = {"rope.cos": rope.cos, "rope.sin": rope.sin}
    return [tensors.row_strides(checker, name, table, unit)[0] for name, table in tables.items()]


def _shape_defines(qkv: str, dim: int, heads: int) -> dict[str, object]:
    """One block a token; as many warps as give each lane `unroll` rows, 8 at most."""
    unroll = 2 if qkv == "float32" else 3
    rows_of_warp = 32 // (dim // 16)
    warps = min(_MOST_WARPS, -(-heads // (rows_of_warp * unroll)))
    return {
        "qkv": CTYPE[qkv],
        "head_dim": dim,
        "threads": 32 * warps,
        "unroll": unroll,
        "resident": _RESIDENT,
    }


def _rope_defines(rotary_dim: int, interleaved: bool) -> dict[str, object]:
    return {"rotary_dim": rotary_dim, "interleaved": int(interleaved)}


def _norm_defines(
    checker: "Checker", weights: dict[str, Any], norm_after_rope: bool
) -> dict[str, object]:
    given = {name: checker.dtype(name) for name, weight in weights.items() if weight is not None}
    place = (2 if norm_after_rope else 1) if given else 0
    q, k = (given.get(name, "float32") for name in weights)
    return {"norm": place, "q_weight": CTYPE[q], "k_weight": CTYPE[k]}


def _kernel(defines: dict[str, object], constants: str, index: int) -> Kernel:
    threads = int(str(defines["threads"]))
    return kernel(
        jit.Specialization.of("rope_write_kv", **defines), index, _fields(constants), threads
    )


def _fields(constants: str) -> tuple[str, ...]:
    return (*(POINTER,) * (len(_ALIGNED) + _OTHERS), constants)


def specializations() -> list[jit.Specialization]:
    """Representatives of every class, for a compile check without a GPU."""
    neox, interleaved, partial = (128, False), (128, True), (64, False)
    whole = [
        _example("none", "bfloat16", 128, neox),
        _example("none", "float16", 64, interleaved, norm=1, return_kv=1, storage="float16"),
        _example("none", "float32", 256, (0, False), norm=2, has_out=1, storage="float32"),
        _example("cache_int8", "bfloat16", 128, neox, per_channel=1, norm=1),
        _example("cache_int8", "bfloat16", 96, (96, False), has_out=1, return_kv=1),
        _example("cache_fp8", "bfloat16", 128, neox, norm=1),
        _example("cache_fp8", "float16", 256, partial, norm=2, has_out=1),
        _example("cache_int4_zp", "bfloat16", 128, neox, per_channel=1),
        _example("cache_int4_zp", "float32", 64, (64, True), per_channel=1, norm=1),
        _example("block_wise_fp8", "bfloat16", 128, neox),
        _example("block_wise_fp8", "float16", 96, (20, True), norm=1, scale_dtype="bfloat16"),
        _example("block_wise_fp8", "float32", 64, (64, False), norm=2, scale_dtype="float16"),
    ]
    return whole


def _example(
    quant: str,
    qkv: str,
    dim: int,
    rope: tuple[int, bool],
    *,
    storage: str = "bfloat16",
    scale_dtype: str = "float32",
    per_channel: int = 0,
    norm: int = 0,
    return_kv: int = 0,
    has_out: int = 0,
) -> jit.Specialization:
    row = quant_spec(quant)
    static = {"static": "float", "per_channel": per_channel} if row.needs_static else {}
    defines = {
        **tensors.codec_defines(row, storage, scale_dtype),
        **static,
        **_shape_defines(qkv, dim, 48),
        **_rope_defines(*rope),
        **{"norm": norm, "q_weight": "Bf16", "k_weight": "Bf16", "return_kv": return_kv},
        "has_out": has_out,
        **({"out": CTYPE[qkv]} if has_out else {}),
    }
    return completed(jit.Specialization.of("rope_write_kv", **defines), _fields(_EXAMPLE_BLOB))


_EXAMPLE_BLOB = Blob.of((INT64, [0] * 21), (INT32, [0] * 9), (FLOAT, [0.0])).field
