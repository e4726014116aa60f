# SPDX-License-Identifier: Apache-2.0
"""`rope_write_kv` in NumPy."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.cache import LayerCache
from fastkv.ops.reference.paging import Paged, places
from fastkv.ops.reference.values import Values
from fastkv.rope import Rope

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]


def rope_write_kv(
    qkv: "NDArray[Any]",
    cache: LayerCache,
    *,
    cu_seqlens_q: "NDArray[np.int32]",
    cache_seqlens: "NDArray[np.int32]",
    block_table: "NDArray[np.int32]",
    rope: Rope | None,
    q_norm_weight: "NDArray[Any] | None",
    k_norm_weight: "NDArray[Any] | None",
    norm_eps: float,
    norm_after_rope: bool,
    q: "NDArray[Any]",
    k: "NDArray[Any] | None",
    v: "NDArray[Any] | None",
    out_k: "NDArray[Any] | None",
    out_v: "NDArray[Any] | None",
    cu_seqlens_k: "NDArray[np.int32] | None",
) -> None:
    """Write the cache, `q` and, where given, `k`, `v`, `out_k` and `out_v`.

    Rows of nobody stay as they are; `q`, `k` and `v` come zero-filled.
    """
    check = Values("rope_write_kv", cache)
    _check(check, qkv, cache, cu_seqlens_q, cache_seqlens, block_table, rope, out_k, cu_seqlens_k)
    requests, positions, rows = _tokens(cu_seqlens_q, cache_seqlens)
    pages, slots = places(block_table, requests, positions, cache.spec.page_size)
    check.one_writer(pages, slots, requests, cache.spec.page_size)
    q_heads, k_heads, v_heads = _split(qkv[rows], cache)
    with np.errstate(all="ignore"):  # NaN and inf are values like others here
        angles = None if rope is None else (rope, positions)
        rotated_q = _norm_and_rotate(q_heads, angles, q_norm_weight, norm_eps, norm_after_rope)
        rotated_k = _norm_and_rotate(k_heads, angles, k_norm_weight, norm_eps, norm_after_rope)
        q[rows] = rotated_q
        for side, x, returned in (("k", rotated_k, k), ("v", v_heads, v)):
            Paged.of(cache, side).write(x, pages, slots)
            if returned is not None:
                returned[rows] = x
        if out_k is not None and out_v is not None and cu_seqlens_k is not None:
            takes_part = np.diff(cu_seqlens_k)[requests] > 0
            targets = (cu_seqlens_k[requests] + positions)[takes_part]
            out_k[targets] = rotated_k[takes_part]
            out_v[targets] = v_heads[takes_part]


def _check(
    check: Values,
    qkv: "NDArray[Any]",
    cache: LayerCache,
    cu_seqlens_q: "NDArray[np.int32]",
    cache_seqlens: "NDArray[np.int32]",
    block_table: "NDArray[np.int32]",
    rope: Rope | None,
    out_k: "NDArray[Any] | None",
    cu_seqlens_k: "NDArray[np.int32] | None",
) -> None:
    """Check every value before anything is written."""
    check.apart(cache)
    page_size = cache.spec.page_size
    new = check.running_sum("cu_seqlens_q", cu_seqlens_q, len(qkv))
    lengths = check.lengths(cache_seqlens, new, block_table, page_size)
    # The prefix's pages too: the op that reads them next would refuse them after this write.
    starts = np.where(new > 0, 0, lengths)
    check.pages(block_table, starts, lengths, len(cache.k), page_size)
    if rope is not None and (bad := (new > 0) & (lengths > len(rope.cos))).any():
        b = int(np.argmax(bad))
        raise check.fault(
            f"rope of request {b}", f"tables of at least {lengths[b]} positions", len(rope.cos)
        )
    if out_k is not None and cu_seqlens_k is not None:
        check.segments(cu_seqlens_k, len(out_k), lengths, exact=new > 0)


def _tokens(
    cu_seqlens_q: "NDArray[np.int32]", cache_seqlens: "NDArray[np.int32]"
) -> "tuple[NDArray[Any], NDArray[Any], slice]":
    """Request and position of each new token, and the rows they are."""
    counts = np.diff(cu_seqlens_q).astype(np.int64)
    requests = np.repeat(np.arange(len(counts)), counts)
    first, last = int(cu_seqlens_q[0]), int(cu_seqlens_q[-1])
    within = np.arange(first, last) - cu_seqlens_q[requests]
    return requests, cache_seqlens[requests] + within.astype(np.int64), slice(first, last)


def _split(qkv: "NDArray[Any]", cache: LayerCache) -> "tuple[F32, F32, F32]":
    """Float32 query heads `[n, Hq, D]`, key heads and value heads `[n, Hkv, D]`."""
    dim, kv = cache.spec.head_dim, cache.spec.num_kv_heads
    heads = qkv.astype(np.float32).reshape(len(qkv), qkv.shape[1] // dim, dim)
    return heads[:, : -2 * kv], heads[:, -2 * kv : -kv], heads[:, -kv:]


def _norm_and_rotate(
    x: "F32",
    angles: "tuple[Rope, NDArray[Any]] | None",
    weight: "NDArray[Any] | None",
    eps: float,
    norm_after_rope: bool,
) -> "F32":
    if weight is not None and not norm_after_rope:
        x = _rms_norm(x, weight, eps)
    if angles is not None:
        x = _rotate(x, *angles)
    if weight is not None and norm_after_rope:
        x = _rms_norm(x, weight, eps)
    return x


def _rms_norm(x: "F32", weight: "NDArray[Any]", eps: float) -> "F32":
    root: F32 = np.sqrt(_sum(x * x) / np.float32(x.shape[-1]) + np.float32(eps))
    return x / root * np.asarray(weight, np.float32)


def _sum(x: "F32") -> "F32":
    """Sum of the last axis, kept, in one order whatever the memory layout: fold halves."""
    while (half := x.shape[-1] // 2) and x.shape[-1] % 2 == 0:
        x = x[..., :half] + x[..., half:]
    total = x[..., :1]
    for i in range(1, x.shape[-1]):
        total = total + x[..., i : i + 1]
    return total


def _rotate(x: "F32", rope: Rope, positions: "NDArray[Any]") -> "F32":
    """Rotate the pairs of the first `rotary_dim` elements of `x [n, heads, D]`."""
    cos, sin = rope.cos[positions][:, None], rope.sin[positions][:, None]
    half = cos.shape[-1]
    if rope.interleaved:
        one, two = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        one, two = slice(0, half), slice(half, 2 * half)
    rotated = x.copy()
    rotated[..., one] = x[..., one] * cos - x[..., two] * sin
    rotated[..., two] = x[..., two] * cos + x[..., one] * sin
    return rotated
