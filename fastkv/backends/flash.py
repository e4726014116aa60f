# SPDX-License-Identifier: Apache-2.0
"""The flash backends: prefill over contiguous K and V, decode over the pages."""

from typing import Any

from fastkv.backends.base import Backend, LayerOptions, batch_arguments
from fastkv.batch import BatchMeta
from fastkv.cache import LayerCache
from fastkv.contracts.presence import require_tensor


class GatheringBackend(Backend):
    """What flash and flash_mask share.

    One `rope_write_kv` serves all rows and leaves the new tokens' exact K and V in a contiguous
    buffer; `gather_kv` adds the cached prefix of the prefill requests; their rows attend over
    that buffer, the decode and draft rows over the pages. Both write into one output.
    """

    def _forward(self, qkv: Any, cache: LayerCache, options: LayerOptions, meta: BatchMeta) -> Any:
        decode = meta.num_decode
        if decode == meta.num_requests:
            q = self._write(qkv, cache, options, meta)
            return self._attend_pages(q, cache, options, meta, None)
        op, sums = f"{self.name}.forward_mixed", "an int32 tensor [B+1]"
        require_tensor(op, "meta.cu_seqlens_k", meta.cu_seqlens_k, sums, cache.quant)
        require_tensor(op, "meta.total_k", meta.total_k, "cu_seqlens_k[B] on the host", cache.quant)
        assert meta.total_k is not None, "required just above"
        shape = (int(meta.total_k), meta.spec.num_kv_heads, meta.spec.head_dim)
        k, v = self.ops.zeros_beside(qkv, shape), self.ops.zeros_beside(qkv, shape)
        q = self._write(qkv, cache, options, meta, out_k=k, out_v=v, cu_seqlens_k=meta.cu_seqlens_k)
        # Rows behind the last decode row count as padding there and are zeroed, so that op runs
        # first; the prefill rows are then written by their own.
        out = self._attend_pages(q, cache, options, meta, decode) if decode else None
        prefill = batch_arguments(meta, slice(decode, None))
        cu_seqlens_q = prefill.pop("cu_seqlens_q")
        cu_seqlens_k = meta.cu_seqlens_k[decode:]
        self.ops.gather_kv(cache, **prefill, cu_seqlens_k=cu_seqlens_k, out_k=k, out_v=v)
        return self.ops.masked_attention(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            **options.attention_arguments(),
            mask_offsets=meta.mask_offsets,
            out=out,
        )

    def _write(
        self,
        qkv: Any,
        cache: LayerCache,
        options: LayerOptions,
        meta: BatchMeta,
        **contiguous: Any,
    ) -> Any:
        return self.ops.rope_write_kv(
            qkv,
            cache,
            **batch_arguments(meta),
            rope=meta.rope,
            **options.write_arguments(),
            **contiguous,
        )

    def _attend_pages(
        self,
        q: Any,
        cache: LayerCache,
        options: LayerOptions,
        meta: BatchMeta,
        decode: int | None,
    ) -> Any:
        requests = None if decode is None else slice(0, decode)
        return self.ops.paged_attention(
            q,
            cache,
            **batch_arguments(meta, requests),
            **options.attention_arguments(),
            mask_offsets=meta.mask_offsets,
        )


class FlashBackend(GatheringBackend):
    """Causal prefill over gathered K and V, the shape that flash-attention libraries serve."""

    name = "flash"
