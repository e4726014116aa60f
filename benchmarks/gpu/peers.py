# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's calls, each over the same data as fastkv's, in the layout that it is fastest in.

Its figures of fp8 are with one scalar scale for K and one for V, which our pools hold (equal over
the heads). XQA computes fp8 with e4m3 q and P; the FA2 kernels convert K and V.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from gpu.data import Batch, Pool
from gpu.report import Report
from gpu.timing import Calls

WORKSPACE = 512 << 20


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer's calls, one for each set of inputs, and what its output is to be multiplied by."""

    calls: Calls
    output_scale: float = 1.0


def add(
    found: Report,
    contenders: dict[str, Calls],
    where: str,
    label: str,
    make: Callable[[], Peer],
    want: torch.Tensor | None,
    bound: float,
) -> None:
    """Add a peer that can be made and called; a result that is not fastkv's `want` is told."""
    if found.skips(where, label):
        return
    where = f"{where} {label}"
    peer = found.attempt(where, make)
    got = peer and found.attempt(where, peer.calls[0])
    if got is None:
        return
    if want is not None:
        found.compare(where, got.float() * peer.output_scale, want, bound)
    contenders[label] = peer.calls


@cache
def _workspace(name: str, device: torch.device) -> torch.Tensor:
    """Shared by the contenders of one kind: they run one after the other. Zeroed, for XQA."""
    del name
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


def _nhd(pool: Pool, page: int, index: int) -> torch.Tensor:
    """`[N, 2, P, Hkv, D]`, a copy; one-byte types by their bytes, which every function takes."""
    dtype = pool.k.dtype
    bits = torch.uint8 if dtype.itemsize == 1 else dtype
    sides = [pool.paged(x, page, index).view(bits).transpose(1, 2) for x in (pool.k, pool.v)]
    return torch.stack(sides, dim=1).view(dtype)


def pages_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's way to say where the pages of a request lie."""
    requests, pages = batch.block_table.shape
    device = batch.block_table.device
    indptr = torch.arange(requests + 1, device=device, dtype=torch.int32) * pages
    last = (batch.context - 1) % batch.page + 1
    return indptr, batch.block_table.flatten(), torch.full_like(indptr[1:], last)


def fa2_decode(pool: Pool, batch: Batch, q: torch.Tensor) -> Peer:
    """One query row a request: `BatchDecodeWithPagedKVCacheWrapper` on tensor cores."""
    import flashinfer

    indptr, indices, last = pages_of(batch)
    k_scale, v_scale = pool.format.multipliers
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace("fa2", q.device), "NHD", use_tensor_cores=True
    )
    plan = (indptr, indices, last, q.shape[1], pool.heads, pool.dim, batch.page)
    wrapper.plan(
        *plan,
        q_data_type=q.dtype,
        kv_data_type=pool.k.dtype,
        sm_scale=k_scale * pool.dim**-0.5,
    )
    caches = [_nhd(pool, batch.page, i) for i in range(pool.sets)]
    return Peer([lambda c=c: wrapper.run(q, c) for c in caches], v_scale)


def paged_prefill(pool: Pool, batch: Batch, q: torch.Tensor, backend: str) -> Peer:
    """Several query rows a request: `BatchPrefillWithPagedKVCacheWrapper`, causal."""
    import flashinfer

    indptr, indices, last = pages_of(batch)
    k_scale, v_scale = pool.format.multipliers
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        _workspace("fa2", q.device), "NHD", backend=backend
    )
    plan = (indptr, indices, last, q.shape[1], pool.heads, pool.dim, batch.page)
    wrapper.plan(
        batch.cu_seqlens_q,
        *plan,
        causal=True,
        q_data_type=q.dtype,
        kv_data_type=pool.k.dtype,
        sm_scale=k_scale * pool.dim**-0.5,
    )
    caches = [_nhd(pool, batch.page, i) for i in range(pool.sets)]
    return Peer([lambda c=c: wrapper.run(q, c) for c in caches], v_scale)


def xqa(pool: Pool, batch: Batch, q: torch.Tensor) -> Peer:
    """XQA, one query row a request or several (its mode for draft tokens, with a causal mask)."""
    from flashinfer.decode import xqa_batch_decode_with_kv_cache as attend

    k_scale, v_scale = pool.format.multipliers
    workspace = _workspace("xqa", q.device)
    lengths = batch.cache_seqlens + batch.queries
    options: dict[str, Any] = {
        "bmm1_scale": k_scale * pool.dim**-0.5,
        "bmm2_scale": v_scale,
        "kv_layout": "HND",
    }
    if batch.queries > 1:
        options["q_len_per_req"] = batch.queries
        options["mask"] = causal_bits(batch.requests, batch.queries, q.device)

    def call(i: int) -> Callable[[], Any]:
        pair = tuple(pool.paged(x, batch.page, i) for x in (pool.k, pool.v))
        return lambda: attend(
            q, pair, workspace, batch.block_table, lengths, batch.context, **options
        )

    shape = q.shape

    def flat(run: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: run().view(shape)

    return Peer([flat(call(i)) for i in range(pool.sets)])


def causal_bits(requests: int, queries: int, device: torch.device) -> torch.Tensor:
    """XQA's mask of the draft tokens: row i sees tokens 0 to i, a bit each, padded to 32."""
    assert queries < 32, "one word a row"
    rows = torch.tensor([(2 << i) - 1 for i in range(queries)], device=device, dtype=torch.int32)
    return rows.view(1, queries, 1).repeat(requests, 1, 1).view(torch.uint16)


def decode_peers(
    pool: Pool, batch: Batch, q: torch.Tensor
) -> Iterable[tuple[str, Callable[[], Peer]]]:
    """Every peer that takes these shapes, by name."""
    one_byte = pool.k.dtype != torch.bfloat16
    if batch.queries == 1:
        yield "FlashInfer FA2", lambda: fa2_decode(pool, batch, q)
    else:
        yield "FlashInfer FA2", lambda: paged_prefill(pool, batch, q, "fa2")
    if batch.queries > 1 and not one_byte:  # FA3 over an fp8 paged cache does not build
        yield "FlashInfer FA3", lambda: paged_prefill(pool, batch, q, "fa3")
    if batch.queries < 32:
        yield "XQA", lambda: xqa(pool, batch, q)


@dataclass(slots=True)
class AppendInputs:
    """One set of a write's inputs, in FlashInfer's shapes; caches NHD."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


def append(inputs: AppendInputs, batch: Batch, index: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """Copy K and V into a bf16 cache: no RoPE, no quantization."""
    import flashinfer

    indptr, indices, last = pages_of(batch)
    caches = (inputs.k_cache, inputs.v_cache)
    return lambda: flashinfer.append_paged_kv_cache(
        inputs.k, inputs.v, *index, caches, indices, indptr, last, "NHD"
    )


def rope_append(
    inputs: AppendInputs,
    batch: Batch,
    index: tuple[torch.Tensor, torch.Tensor],
    cos_sin: torch.Tensor,
    scale: float,
    positions: torch.Tensor,
) -> Any:
    """RoPE, quantize to fp8 and append, fused; it writes q as fp8."""
    from flashinfer.rope import rope_quantize_fp8_append_paged_kv_cache as fused

    indptr, indices, _ = pages_of(batch)
    caches = (inputs.k_cache, inputs.v_cache)
    return lambda: fused(
        inputs.q,
        inputs.k,
        None,
        None,
        inputs.v,
        cos_sin,
        positions,
        caches,
        indices,
        indptr,
        *index,
        is_neox=True,
        quantize_dtype=torch.float8_e4m3fn,
        quant_scale_q=1.0,
        quant_scale_kv=scale,
        page_size=batch.page,
        kv_layout="NHD",
    )


def index_kernel(batch: Batch, tokens: int) -> tuple[Callable[[], Any], tuple[Any, Any]]:
    """What FlashInfer needs before each append, and its two results."""
    import flashinfer

    device = batch.block_table.device
    rows, positions = (torch.zeros(tokens, device=device, dtype=torch.int32) for _ in range(2))
    lengths = batch.cache_seqlens + batch.queries

    def run() -> None:
        flashinfer.get_batch_indices_positions(
            batch.cu_seqlens_q, lengths, tokens, batch_indices=rows, positions=positions
        )

    run()
    return run, (rows, positions)
