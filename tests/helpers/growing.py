# SPDX-License-Identifier: Apache-2.0
"""One call of every op whose lengths grow in place, as a captured graph's do from step to step."""

import numpy as np

from fastkv.arrays import numpy_dtype
from helpers.batches import floats, make_batch, running_sum
from helpers.calls import Call

NEW = (1, 4, 0, 3)
PADDING = 2
#: Cached tokens of each request at each step: none, some, over several pages, full.
STEPS = ((0, 0, 0, 0), (3, 16, 5, 1), (47, 16, 5, 33), (95, 60, 5, 130))


def growing_call(op, fmt, dtype="float16", seed=0):
    """A call on the host, and of each step the arguments that are written in place.

    Tensors keep their shapes: the block table has room for the last step from the first.

    Returns:
        The call, at its first step, and for each step `{argument: array}`.
    """
    rng = np.random.default_rng(seed)
    batch = make_batch(
        rng, fmt, cached=STEPS[-1], new=NEW, dtype=dtype, qkv_dtype=dtype, padding=PADDING, group=4
    ).fill(rng)
    rows, heads = len(batch.qkv), batch.query_heads
    kv, dim = batch.cache.spec.num_kv_heads, batch.cache.spec.head_dim
    total = sum(batch.lengths)
    queries = (rows, heads, dim)

    def empty(*shape):
        return np.zeros(shape, numpy_dtype(dtype))

    def lengths(step):
        return np.array(step, np.int32)

    meta = {"cu_seqlens_q": batch.cu_seqlens_q, "block_table": batch.block_table}
    contiguous = {"out_k": empty(total, kv, dim), "out_v": empty(total, kv, dim)}
    pages = rng.permutation(len(batch.cache.k)).astype(np.int32)
    if op == "rope_write_kv":
        fixed = {"qkv": batch.qkv, "cache": batch.cache, **meta, "rope": batch.rope}
        fixed |= {"q_norm_weight": floats(rng, dim), "k_norm_weight": floats(rng, dim)}
        fixed |= contiguous
        steps = [
            {
                "cache_seqlens": lengths(step),
                "cu_seqlens_k": running_sum(lengths(step) + NEW),
                "qkv": floats(rng, batch.qkv.shape, dtype),
            }
            for step in STEPS
        ]
    elif op == "gather_kv":
        fixed = {"cache": batch.cache, "block_table": batch.block_table, **contiguous}
        fixed |= {"cu_seqlens_k": running_sum(batch.lengths)}
        steps = [{"cache_seqlens": lengths(step)} for step in STEPS]
    elif op == "paged_attention":
        fixed = {"cache": batch.cache, **meta, "return_lse": True}
        steps = [
            {"cache_seqlens": lengths(step), "q": floats(rng, queries, dtype)} for step in STEPS
        ]
    elif op == "masked_attention":
        k, v = floats(rng, (2, total, kv, dim), dtype)
        fixed = {"k": k, "v": v, "cu_seqlens_q": batch.cu_seqlens_q, "return_lse": True}
        steps = [
            {
                "cu_seqlens_k": running_sum(lengths(step) + NEW),
                "q": floats(rng, queries, dtype),
            }
            for step in STEPS
        ]
    elif op == "merge_states":
        fixed = {}
        steps = [
            {
                "out_a": floats(rng, queries, dtype),
                "lse_a": floats(rng, queries[:2]),
                "out_b": floats(rng, queries, dtype),
                "lse_b": floats(rng, queries[:2]),
            }
            for _ in STEPS
        ]
    else:
        assert op == "copy_pages", op
        fixed = {"cache": batch.cache}
        # A growing number of pages; -1 where there is none.
        steps = []
        for count in range(1, 1 + len(STEPS)):
            src, dst = np.full((2, len(STEPS)), -1, np.int32)
            src[:count], dst[:count] = pages[:count], pages[len(STEPS) : len(STEPS) + count]
            steps.append({"src": src, "dst": dst})
    return Call(op, fixed | steps[0]), steps
