# SPDX-License-Identifier: Apache-2.0
"""What the two ops that write leave to each other: prompt tokens and decode tokens."""

import numpy as np
import pytest

from fastkv import arrays
from fastkv.integrations import fastdeploy
from helpers import fastdeploy_backends as engine_calls
from helpers.compare import assert_same_bits, bits
from helpers.fastdeploy_engine import MIXTURE, Engine, tensor
from helpers.sentinels import FORMATS


def mixed_step(fmt):
    """An engine before a step of prefill and decode requests, with its qkv and batch."""
    engine = Engine(np.random.default_rng(40), "append", fmt)
    engine.run(MIXTURE[:2])
    qkv = engine.tokens(MIXTURE[2])
    meta = engine.meta(MIXTURE[2])
    forward_meta = engine.forward_meta(qkv, meta)
    engine_calls.prepare(engine.config, forward_meta)
    return engine, tensor(qkv), meta, forward_meta


def pages_of(engine, meta, decode):
    """Page ids of the requests of one kind."""
    kinds = [engine.step.is_decode(b) for b in range(len(meta.block_table))]
    return {int(i) for b in np.flatnonzero(np.array(kinds) == decode) for i in meta.block_table[b]}


def written(engine, before):
    """Pages of layer 1 that changed."""
    width = len(engine.caches) // 3
    pages = set()
    for i, (cache, old) in enumerate(zip(engine.caches, before, strict=True)):
        changed = (bits(cache) != old).reshape(len(cache), -1).any(axis=1)
        assert i // width == 1 or not changed.any()
        pages |= set(np.flatnonzero(changed).tolist())
    return pages


@pytest.mark.parametrize("fmt", FORMATS)
def test_append_attention_without_prompts_serves_decode_alone(fmt):
    engine, qkv, meta, forward_meta = mixed_step(fmt)
    every = engine_calls.append(engine.config, qkv, engine.engine_layer, forward_meta)
    before = [bits(cache) for cache in engine.caches]
    fresh = tensor(engine.tokens(MIXTURE[2]))
    lengths = forward_meta.max_len_tensor_cpu.clone()
    lengths[1] = 0
    out = fastdeploy.append_attention(
        *engine_calls.append_arguments(
            engine.config, qkv, engine.engine_layer, forward_meta, lengths
        )
    )
    got, want = arrays.to_host(out), arrays.to_host(every).copy()
    for b in range(len(meta.block_table)):
        if not engine.step.is_decode(b):
            want[meta.cu_seqlens_q[b] : meta.cu_seqlens_q[b + 1]] = 0
    assert want.any()
    assert_same_bits(got, want)
    # Other tokens: those of the decode requests are written, the prompts' are not.
    fastdeploy.append_attention(
        *engine_calls.append_arguments(
            engine.config, fresh, engine.engine_layer, forward_meta, lengths
        )
    )
    changed = written(engine, before)
    assert changed
    assert changed <= pages_of(engine, meta, decode=True)


@pytest.mark.parametrize("fmt", FORMATS)
def test_gqa_rope_write_cache_writes_prompts_alone(fmt):
    engine, qkv, meta, forward_meta = mixed_step(fmt)
    before = [bits(cache) for cache in engine.caches]
    sums, *_, total = fastdeploy.pre_cache_len_concat(
        *(forward_meta.seq_lens_encoder, forward_meta.seq_lens_decoder),
        *(forward_meta.seq_lens_this_time, 0, engine.page),
    )
    q, k, v, _ = engine_calls.write_cache(
        engine.config, qkv, engine.engine_layer, forward_meta, sums, total.item()
    )
    changed = written(engine, before)
    assert changed
    assert changed <= pages_of(engine, meta, decode=False)
    assert k.shape[0] == total.item()
    assert all(np.isfinite(arrays.to_host(x)).all() for x in (q[:-2], k, v))
