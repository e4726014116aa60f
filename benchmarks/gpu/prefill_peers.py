# SPDX-License-Identifier: Apache-2.0
"""Prefill over contiguous K and V by others: FlashInfer, cuDNN through PyTorch, FlexAttention."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch

from gpu.peers import Peer

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
WORKSPACE = 256 << 20


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


def flashinfer_single(sets: Sequence[Triple], causal: bool, backend: str) -> Peer:
    """One request: `single_prefill_with_kv_cache`."""
    import flashinfer

    attend = flashinfer.single_prefill_with_kv_cache
    return Peer([lambda x=x: attend(*x, causal=causal, backend=backend) for x in sets])


def flashinfer_ragged(
    sets: Sequence[Triple], lengths: Sequence[int], causal: bool, backend: str
) -> Peer:
    """Several requests: `BatchPrefillWithRaggedKVCacheWrapper`, planned once."""
    import flashinfer

    q, k, _ = sets[0]
    indptr = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        _workspace(q.device), "NHD", backend=backend
    )
    heads = (q.shape[1], k.shape[1], q.shape[2])
    wrapper.plan(indptr, indptr, *heads, causal=causal, q_data_type=q.dtype, kv_data_type=k.dtype)
    return Peer([lambda x=x: wrapper.run(*x) for x in sets])


def cudnn(sets: Sequence[Triple], causal: bool) -> Peer:
    """One request: PyTorch's `scaled_dot_product_attention` by cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as attend

    def call(x: Triple) -> Callable[[], torch.Tensor]:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in x)

        def run() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return attend(q, k, v, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)

        return run

    return Peer([call(x) for x in sets])


def flex(sets: Sequence[Triple], start: torch.Tensor) -> Peer:
    """One request whose row i sees `[start[i], i]`: FlexAttention, compiled for the mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b: Any, h: Any, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        del b, h
        return (key >= start[row]) & (key <= row)

    n = len(start)
    mask = create_block_mask(sees, None, None, n, n, device=str(start.device))
    torch._dynamo.reset()
    attend = torch.compile(flex_attention, dynamic=False)

    def call(x: Triple) -> Callable[[], torch.Tensor]:
        q, k, v = (tensor.transpose(0, 1)[None].contiguous() for tensor in x)
        return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return Peer([call(x) for x in sets])
