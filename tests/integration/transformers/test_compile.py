# SPDX-License-Identifier: Apache-2.0
"""The custom ops, and a whole model over them in one graph."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from fastkv import ops
from fastkv.integrations import torch as fastkv_torch
from fastkv.integrations.transformers import PagedCache, calibrate
from fastkv.quant import QUANT_SPECS
from helpers.array_suite import map_arrays
from helpers.batches import make_batch
from helpers.tiny_models import SHAPE, positions, prompts, tiny

FORMATS = list(QUANT_SPECS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def as_torch(value):
    def convert(array):
        bits = torch.from_numpy(np.array(array).view(f"u{array.itemsize}"))
        return bits.view(getattr(torch, array.dtype.name)).clone()

    return map_arrays(value, convert)


def bits(part):
    is_float8 = isinstance(part, torch.Tensor) and part.dtype is torch.float8_e4m3fn
    return part.view(torch.uint8) if is_float8 else part


def batch_of(form):
    row = QUANT_SPECS[form]
    granularity = row.granularities[0].value if row.granularities else None
    rng = np.random.default_rng(0)
    return make_batch(rng, form, granularity, dtype="float32", qkv_dtype="float32")


def as_arguments(batch):
    """What a batch of the tests is to the custom ops."""
    cache = as_torch(batch.cache)
    order = ("cu_seqlens_q", "cache_seqlens", "block_table")
    return cache, tuple(as_torch(batch.meta[name]) for name in order)


@pytest.mark.parametrize("form", FORMATS)
def test_custom_ops_keep_the_rules_of_the_library(form):
    batch = batch_of(form)
    cache, meta = as_arguments(batch)
    qkv, rope = as_torch(batch.qkv), as_torch(batch.rope)
    # The library compares values: float8 as its bytes, and no NaN where nothing was written.
    parts = [bits(part) for part in fastkv_torch._parts(cache)]
    for part in parts[:4]:
        if part is not None:
            part.zero_()
    write = (qkv, *parts, *meta, rope.cos, rope.sin, rope.interleaved)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastkv.rope_write_kv.default, write, test_utils=tests)
    q = torch.ops.fastkv.rope_write_kv(*write)
    attend = (q, *parts, *meta, 0.3, 7, 20.0, torch.ones(q.shape[1]))
    torch.library.opcheck(torch.ops.fastkv.paged_attention.default, attend, test_utils=tests)


@pytest.mark.parametrize(
    ("form", "rotated"), [*((form, False) for form in FORMATS), ("block_wise_fp8", True)]
)
def test_a_compiled_step_gives_what_the_ops_give(form, rotated):
    batch = batch_of(form)
    order = ("cu_seqlens_q", "cache_seqlens", "block_table")
    options = {"scale": 0.3, "window": 7, "soft_cap": 20.0}

    def step(qkv, cache, meta, rope, sinks):
        named = dict(zip(order, meta, strict=True))
        q = fastkv_torch.rope_write_kv(qkv, cache, **named, rope=rope)
        out = fastkv_torch.paged_attention(q, cache, **named, **options, sinks=sinks)
        return out * 2

    host = map_arrays(batch.cache, np.copy)
    rope = batch.rope if rotated else None
    q = ops.rope_write_kv(batch.qkv, host, **batch.meta, rope=rope)
    sinks = np.linspace(-1, 1, q.shape[1], dtype=np.float32)
    want = ops.paged_attention(q, host, **batch.meta, **options, sinks=sinks)
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        cache, meta = as_arguments(batch)
        rope = as_torch(batch.rope) if rotated else None
        got = run(as_torch(batch.qkv), cache, meta, rope, torch.from_numpy(sinks))
        np.testing.assert_array_equal(got.numpy(), 2 * want)
        for name in ("k", "v", "k_scale", "v_scale"):
            if getattr(host, name) is not None:
                written = getattr(cache, name).view(torch.uint8).numpy()
                np.testing.assert_array_equal(written, getattr(host, name).view(np.uint8))


def decode(model, run, cache, steps=7):
    """Logits of a padded batch's last tokens, step by step."""
    inputs = prompts((12, 7, 1))
    ids, mask, found = inputs["input_ids"], inputs["attention_mask"], []
    with torch.no_grad():
        for _ in range(steps):
            at = positions(mask, ids.shape[1])
            logits = run(ids, attention_mask=mask, position_ids=at, past_key_values=cache).logits
            found.append(logits[:, -1])
            ids = logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    return torch.stack(found)


def test_a_model_is_one_graph():
    form = "cache_int4_zp"
    model = tiny(LlamaConfig(**{**SHAPE, "num_hidden_layers": 2}))
    seen = PagedCache()
    with torch.no_grad():
        model(prompts((40,))["input_ids"], past_key_values=seen)
    scales = calibrate(seen, form)
    caches = [PagedCache(form, scales=scales, page_size=16, reserve=64) for _ in range(2)]
    caches[1].prepare(model, 3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    want = decode(model, model, caches[0])
    got = decode(model, torch.compile(model, fullgraph=True, backend=counter), caches[1])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2, "one graph for the prompt, one for all later steps"
    assert caches[1].length == caches[0].length == 18
    for mine, other in zip(caches[1].keys_values(1), caches[0].keys_values(1), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rope_is_traced_with_its_style(interleaved):
    batch = batch_of("none")
    cache, meta = as_arguments(batch)
    qkv, rope = as_torch(batch.qkv), as_torch(replace(batch.rope, interleaved=interleaved))
    named = dict(zip(("cu_seqlens_q", "cache_seqlens", "block_table"), meta, strict=True))

    def write(x):
        return fastkv_torch.rope_write_kv(x, cache, **named, rope=rope)

    want = write(qkv)
    compiled = torch.compile(write, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(qkv), want)
