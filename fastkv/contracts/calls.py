# SPDX-License-Identifier: Apache-2.0
"""One contract per op: presence, then shapes, dtypes, libraries and devices.

Each function raises before anything is launched or written, and returns the checker, which knows
the call's sizes, library and device.
"""

from typing import TYPE_CHECKING, Any

from fastkv.contracts.numbers import is_finite, is_integer
from fastkv.contracts.presence import require_cache, require_tensor
from fastkv.contracts.remember import remembered
from fastkv.contracts.tensors import F32, FLOAT, INT32, Checker, Rule, check_cache
from fastkv.errors import ContractError, DtypeError, MissingTensorError, ShapeError
from fastkv.rope import Rope

if TYPE_CHECKING:
    from fastkv.cache import LayerCache
    from fastkv.quant import QuantSpec

_CU_Q = Rule("cu_seqlens_q", ("B+1",), INT32)
_CU_K = Rule("cu_seqlens_k", ("B+1",), INT32)
_LENGTHS = Rule("cache_seqlens", ("B",), INT32)
_TABLE = Rule("block_table", ("B", "M"), INT32)
_MASK = Rule("mask_offsets", ("T", "2"), INT32)
_SINKS = Rule("sinks", ("Hq",), F32)
_WIDTH = "(Hq + 2*Hkv) * D"
_QKV = Rule("qkv", ("T", _WIDTH), FLOAT)
_Q = Rule("q", ("T", "Hq", "D"), FLOAT)


@remembered
def rope_write_kv(
    qkv: Any,
    cache: "LayerCache",
    cu_seqlens_q: Any,
    cache_seqlens: Any,
    block_table: Any,
    rope: Rope | None,
    q_norm_weight: Any,
    k_norm_weight: Any,
    norm_eps: float,
    out_k: Any,
    out_v: Any,
    cu_seqlens_k: Any,
) -> Checker:
    """Contract of `fastkv.ops.rope_write_kv`."""
    op = "rope_write_kv"
    quant = require_cache(op, cache)
    checker = Checker(op, quant)
    for rule, array in ((_CU_Q, cu_seqlens_q), (_LENGTHS, cache_seqlens), (_TABLE, block_table)):
        require_tensor(op, rule.name, array, f"an int32 tensor [{', '.join(rule.dims)}]", quant)
    require_tensor(op, "qkv", qkv, "a tensor [T, (Hq + 2*Hkv) * D]", quant)
    checker.tensor(_QKV, qkv)
    check_cache(checker, cache, written=True)
    _check_batch(checker, cu_seqlens_q, cache_seqlens, block_table)
    checker.sizes["Hq"] = _query_heads(checker)
    if rope is not None:
        _check_rope(checker, rope, quant)
    checker.optional(Rule("q_norm_weight", ("D",), FLOAT), q_norm_weight)
    checker.optional(Rule("k_norm_weight", ("D",), FLOAT), k_norm_weight)
    if not is_finite(norm_eps) or norm_eps < 0:
        raise _wrong_number(checker, "norm_eps", "a finite number of at least 0", norm_eps)
    _check_contiguous_out(checker, out_k, out_v, cu_seqlens_k)
    return checker


@remembered
def check_step(
    op: str,
    qkv: Any,
    cache: "LayerCache",
    cu_seqlens_q: Any,
    cache_seqlens: Any,
    block_table: Any,
    sinks: Any,
    mask_offsets: Any,
    cu_seqlens_k: Any,
) -> Checker:
    """Contract of `fastkv.ops.check_step`."""
    checker = Checker(op, require_cache(op, cache))
    checker.sizes |= {"Hkv": cache.spec.num_kv_heads, "D": cache.spec.head_dim, "2": 2}
    checker.tensor(_QKV, qkv)
    checker.sizes["Hq"] = _query_heads(checker)
    _check_batch(checker, cu_seqlens_q, cache_seqlens, block_table)
    checker.optional(_CU_K, cu_seqlens_k)
    checker.optional(_MASK, mask_offsets)
    checker.optional(_SINKS, sinks)
    return checker


@remembered
def gather_kv(
    cache: "LayerCache",
    cache_seqlens: Any,
    block_table: Any,
    cu_seqlens_k: Any,
    out_k: Any,
    out_v: Any,
) -> Checker:
    """Contract of `fastkv.ops.gather_kv`."""
    op = "gather_kv"
    quant = require_cache(op, cache)
    checker = Checker(op, quant)
    given = {"cache_seqlens": cache_seqlens, "block_table": block_table}
    given |= {"cu_seqlens_k": cu_seqlens_k, "out_k": out_k, "out_v": out_v}
    for name, array in given.items():
        require_tensor(op, name, array, "a tensor", quant)
    check_cache(checker, cache, written=False)
    checker.tensor(_LENGTHS, cache_seqlens)
    checker.tensor(_TABLE, block_table)
    _check_contiguous_out(checker, out_k, out_v, cu_seqlens_k)
    return checker


@remembered
def paged_attention(
    q: Any,
    cache: "LayerCache",
    cu_seqlens_q: Any,
    cache_seqlens: Any,
    block_table: Any,
    mask_offsets: Any,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    sinks: Any,
    out: Any,
) -> Checker:
    """Contract of `fastkv.ops.paged_attention`."""
    op = "paged_attention"
    quant = require_cache(op, cache)
    checker = Checker(op, quant)
    given = {"q": q, "cu_seqlens_q": cu_seqlens_q, "cache_seqlens": cache_seqlens}
    for name, array in (given | {"block_table": block_table}).items():
        require_tensor(op, name, array, "a tensor", quant)
    checker.sizes |= {"Hkv": cache.spec.num_kv_heads, "D": cache.spec.head_dim}
    _check_query(checker, q, mask_offsets, sinks, out)
    _check_softmax(checker, scale, window, soft_cap)
    check_cache(checker, cache, written=False)
    _check_batch(checker, cu_seqlens_q, cache_seqlens, block_table)
    return checker


@remembered
def masked_attention(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    mask_offsets: Any,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    sinks: Any,
    out: Any,
) -> Checker:
    """Contract of `fastkv.ops.masked_attention`."""
    op = "masked_attention"
    checker = Checker(op)
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    for name, array in given.items():
        require_tensor(op, name, array, "a tensor")
    k_info = checker.tensor(Rule("k", ("Tk", "Hkv", "D"), FLOAT), k)
    checker.tensor(Rule("v", ("Tk", "Hkv", "D"), (k_info.dtype,)), v)
    _check_query(checker, q, mask_offsets, sinks, out)
    _check_softmax(checker, scale, window, soft_cap)
    checker.tensor(_CU_Q, cu_seqlens_q)
    checker.tensor(_CU_K, cu_seqlens_k)
    return checker


@remembered
def merge_states(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> Checker:
    """Contract of `fastkv.ops.merge_states`."""
    op = "merge_states"
    checker = Checker(op)
    given = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, array in given.items():
        require_tensor(op, name, array, "a tensor")
    info = checker.tensor(Rule("out_a", ("T", "Hq", "D"), FLOAT), out_a)
    checker.tensor(Rule("lse_a", ("T", "Hq"), F32), lse_a)
    checker.tensor(Rule("out_b", ("T", "Hq", "D"), (info.dtype,)), out_b)
    checker.tensor(Rule("lse_b", ("T", "Hq"), F32), lse_b)
    return checker


@remembered
def copy_pages(cache: "LayerCache", src: Any, dst: Any) -> Checker:
    """Contract of `fastkv.ops.copy_pages`."""
    op = "copy_pages"
    quant = require_cache(op, cache)
    checker = Checker(op, quant)
    for name, array in (("src", src), ("dst", dst)):
        require_tensor(op, name, array, "page ids, int32 [n]", quant)
    check_cache(checker, cache, written=True)
    checker.tensor(Rule("src", ("n",), INT32), src)
    checker.tensor(Rule("dst", ("n",), INT32), dst)
    return checker


def _check_batch(checker: Checker, cu_seqlens_q: Any, lengths: Any, table: Any) -> None:
    checker.tensor(_LENGTHS, lengths)
    checker.tensor(_CU_Q, cu_seqlens_q)
    checker.tensor(_TABLE, table)


def _query_heads(checker: Checker) -> int:
    """Hq from the width of qkv."""
    width, heads, dim = (checker.sizes[name] for name in (_WIDTH, "Hkv", "D"))
    query_heads = width // dim - 2 * heads
    if width % dim or query_heads < 1 or query_heads % heads:
        raise ShapeError(
            checker.op,
            "qkv",
            format=checker.format,
            expected=f"[T, (Hq + 2*Hkv) * D] with Hkv = {heads}, D = {dim}, Hq a multiple of Hkv",
            got=f"[{checker.sizes['T']}, {width}]",
        )
    return query_heads


def _check_rope(checker: Checker, rope: Rope, quant: "QuantSpec") -> None:
    if not isinstance(rope, Rope):
        raise DtypeError(
            checker.op,
            "rope",
            format=checker.format,
            expected="a fastkv.Rope or None",
            got=type(rope).__name__,
        )
    for name in ("cos", "sin"):
        rule = Rule(f"rope.{name}", ("max_len", "rotary_dim/2"), F32)
        require_tensor(checker.op, rule.name, getattr(rope, name), "a float32 table", quant)
        checker.tensor(rule, getattr(rope, name))
    rotary_dim, dim = 2 * checker.sizes["rotary_dim/2"], checker.sizes["D"]
    if not 0 < rotary_dim <= dim:
        raise ShapeError(
            checker.op,
            "rope.cos",
            format=checker.format,
            expected=f"[max_len, rotary_dim/2] with 0 < rotary_dim <= D = {dim}",
            got=f"rotary_dim {rotary_dim}",
        )


def _check_contiguous_out(checker: Checker, out_k: Any, out_v: Any, cu_seqlens_k: Any) -> None:
    """`out_k`, `out_v` and `cu_seqlens_k` come together or not at all."""
    given = {"out_k": out_k, "out_v": out_v, "cu_seqlens_k": cu_seqlens_k}
    absent = [name for name, array in given.items() if array is None]
    if len(absent) == len(given):
        return
    if absent:
        raise MissingTensorError(
            checker.op,
            absent[0],
            format=checker.format,
            expected="out_k, out_v and cu_seqlens_k together, or none of them",
            got="None",
        )
    info = checker.tensor(Rule("out_k", ("Tk", "Hkv", "D"), FLOAT, True), out_k)
    checker.tensor(Rule("out_v", ("Tk", "Hkv", "D"), (info.dtype,), True), out_v)
    checker.tensor(_CU_K, cu_seqlens_k)


def _check_query(checker: Checker, q: Any, mask_offsets: Any, sinks: Any, out: Any) -> None:
    info = checker.tensor(_Q, q)
    query_heads, heads = checker.sizes["Hq"], checker.sizes["Hkv"]
    if not (query_heads and heads and checker.sizes["D"]) or query_heads % heads:
        raise ShapeError(
            checker.op,
            "q",
            format=checker.format,
            expected=f"D > 0 and Hq > 0, a multiple of Hkv = {heads}",
            got=f"Hq = {query_heads}, D = {checker.sizes['D']}",
        )
    checker.sizes["2"] = 2
    checker.optional(_MASK, mask_offsets)
    checker.optional(_SINKS, sinks)
    checker.optional(Rule("out", ("T", "Hq", "D"), (info.dtype,), True), out)


def _check_softmax(
    checker: Checker, scale: float | None, window: int | None, soft_cap: float | None
) -> None:
    if scale is not None and not is_finite(scale):
        raise _wrong_number(checker, "scale", "None or a finite number", scale)
    if window is not None and not (is_integer(window) and window >= 1):
        raise _wrong_number(checker, "window", "None or an integer of at least 1", window)
    if soft_cap is not None and not (is_finite(soft_cap) and soft_cap > 0):
        raise _wrong_number(checker, "soft_cap", "None or a finite number above 0", soft_cap)


def _wrong_number(checker: Checker, name: str, expected: str, value: object) -> ContractError:
    return ContractError(
        checker.op, name, format=checker.format, expected=expected, got=repr(value)
    )
