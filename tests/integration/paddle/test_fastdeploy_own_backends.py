# SPDX-License-Identifier: Apache-2.0
"""fastkv's own backends under FastDeploy's interface: its layer, its batch, `forward_mixed`."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from fastkv import CacheSpec
from fastkv.backends import resolve
from fastkv.errors import (
    MissingTensorError,
    SpecMismatchError,
    UnsupportedError,
)
from fastkv.integrations import fastdeploy
from helpers.fastdeploy_engine import MIXTURE, Engine, tensor
from helpers.sentinels import FORMATS


def int32(*values):
    return paddle.to_tensor(np.array(values, np.int32))


TENSOR = paddle.ones([2])


def served(fmt="cache_int8", backend="append", **options):
    engine = Engine(np.random.default_rng(5), f"fastkv:{backend}", fmt, **options)
    qkv = engine.tokens(MIXTURE[0])
    meta = engine.forward_meta(qkv, engine.meta(MIXTURE[0]))
    return engine, tensor(qkv), meta


def forward(engine, qkv, meta, compressed_kv=None, k_pe=None):
    backend = fastdeploy.AttentionBackend(engine.spec, engine.own)
    return backend.forward_mixed(
        None, None, None, qkv, compressed_kv, k_pe, engine.engine_layer, meta
    )


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("call", "compressed_kv", TENSOR),
        ("call", "k_pe", TENSOR),
        ("layer", "qkv_scale", TENSOR),
        ("layer", "linear_shift", TENSOR),
        ("layer", "linear_smooth", TENSOR),
        ("layer", "out_scale", 0.5),
        ("forward_meta", "attn_mask", TENSOR),
    ],
)
def test_own_backends_name_what_they_do_not_serve(where, name, value):
    engine, qkv, meta = served()
    before = [cache.copy() for cache in engine.caches]
    if where != "call":
        setattr(engine.engine_layer if where == "layer" else meta, name, value)
    call = {name: value} if where == "call" else {}
    with pytest.raises(UnsupportedError) as caught:
        forward(engine, qkv, meta, **call)
    assert caught.value.argument == (name if where == "call" else f"{where}.{name}")
    for cache, want in zip(engine.caches, before, strict=True):
        assert (cache.view("u1") == want.view("u1")).all()


@pytest.mark.parametrize("count", [1, 3, 5, 7, 12])
@pytest.mark.parametrize("fmt", ["cache_int8", "block_wise_fp8"])
def test_a_wrong_number_of_cache_tensors_is_refused(count, fmt):
    engine, qkv, meta = served(fmt)
    if count == engine.spec.num_tensors:
        count += 1
    meta.caches = (meta.caches * 2)[:count]
    with pytest.raises(SpecMismatchError) as caught:
        forward(engine, qkv, meta)
    error = caught.value
    assert (error.op, error.argument, error.format) == ("meta_from", "caches", fmt)
    assert error.expected == f"a list of {engine.spec.num_tensors} tensors for 3 layers"
    assert error.got == f"{count} tensors"


def test_a_norm_before_rope_is_the_models():
    # The engine's model then norms before it calls attention: the weights are not read here.
    engine, qkv, meta = served(normed=False)
    want = forward(engine, qkv, meta).numpy()
    engine.engine_layer.qk_norm_before_rope = True
    engine.engine_layer.q_norm_weight = engine.engine_layer.k_norm_weight = paddle.full([16], 3.0)
    assert (forward(engine, qkv, meta).numpy() == want).all()
    engine.engine_layer.qk_norm_before_rope = False
    assert not np.allclose(forward(engine, qkv, meta).numpy()[:12], want[:12], atol=0.01)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_engines_layer_goes_into_resolve_as_it_is(fmt):
    engine, _, meta = served(fmt)
    cache = resolve(meta.caches, engine.engine_layer, engine.spec)
    width = 4 if fmt == "block_wise_fp8" else 2
    assert cache.k is meta.caches[width]
    assert cache.v is meta.caches[width + 1]
    if cache.quant.needs_static:
        assert cache.static.v_dequant is engine.engine_layer.cache_v_out_scale
    else:
        assert cache.static is None


def test_meta_from_keeps_the_order_and_counts_the_leading_decode_requests():
    spec = CacheSpec(1, 2, 8, 4, "none", "float32")
    meta = SimpleNamespace(
        caches=spec.allocate(8, "paddle"),
        seq_lens_encoder=int32(0, 0, 3, 0, 2),
        seq_lens_decoder=int32(6, 2, 0, 5, 4),
        seq_lens_this_time=int32(1, 0, 3, 1, 2),
        cu_seqlens_q=int32(0, 1, 1, 4, 5, 7),
        block_tables=paddle.zeros([5, 2], "int32"),
    )
    batch = fastdeploy.meta_from(meta, spec)
    assert (batch.num_decode, batch.total_k) == (2, 3 + 6 + 6)
    assert batch.cu_seqlens_k.tolist() == [0, 0, 0, 3, 9, 15]
    assert batch.cache_seqlens.tolist() == [6, 2, 0, 5, 4]
    assert batch.rope is batch.mask_offsets is None
    plain = fastdeploy.meta_from(meta, spec, gathered=False)
    assert (plain.num_decode, plain.total_k, plain.cu_seqlens_k) == (0, None, None)
    meta.attn_backend = fastdeploy.AttentionBackend(spec, "append")
    assert fastdeploy.meta_from(meta).spec is spec
    meta.attn_backend = SimpleNamespace()  # one of the engine's own
    with pytest.raises(MissingTensorError, match="meta_from: spec: expected a CacheSpec, got None"):
        fastdeploy.meta_from(meta)
    meta.seq_lens_decoder = None
    with pytest.raises(MissingTensorError, match="meta_from: seq_lens_decoder"):
        fastdeploy.meta_from(meta, spec)


def test_a_step_shares_its_batch_until_the_next_one_begins(mocker):
    engine, qkv, meta = served("none", "flash")
    made = mocker.spy(fastdeploy.backend, "meta_from")
    backend = fastdeploy.AttentionBackend(engine.spec, "flash")
    call = (None, None, None, qkv, None, None, engine.engine_layer)
    backend.init_attention_metadata(meta)
    for _ in range(3):
        backend.forward_mixed(*call, meta)
    assert made.call_count == 1
    backend.forward_mixed(*call, SimpleNamespace(**vars(meta)))
    assert made.call_count == 2
