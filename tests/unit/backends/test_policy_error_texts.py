# SPDX-License-Identifier: Apache-2.0
"""The whole text of each kind of refusal of the policies and the spec, as an engine reads it."""

from types import SimpleNamespace

import pytest

from fastkv import BatchMeta, CacheSpec, StaticScales
from fastkv.backends import Device, get_backend, name_from_environment, resolve, select_backend
from fastkv.errors import FastKVError
from fastkv.quant import quant_spec
from helpers.recording import RecordingOps
from helpers.sentinels import Sentinel, Sliceable, bare_layer, flat_list, sentinel_meta

INT8 = CacheSpec(2, 6, 64, 16, "cache_int8")
QKV = Sliceable("qkv", 40, 320)


def resolved(fmt, caches=None, **attributes):
    spec = CacheSpec(2, 6, 64, 16, fmt)
    layer = bare_layer(fmt, **attributes)
    return resolve(flat_list(spec) if caches is None else caches, layer, spec)


def twice(fmt):
    spec = CacheSpec(2, 6, 64, 16, fmt)
    caches = flat_list(spec)
    caches[3] = caches[2]
    return resolve(caches, bare_layer(fmt, 1), spec)


def bundle(**fields):
    names = ("k_quant", "k_dequant", "v_quant", "v_dequant")
    return StaticScales(**({name: Sentinel(name) for name in names} | fields))


def served(backend, fmt="cache_int8", qkv=QKV, *, meta=None, layer=None, **changes):
    spec = CacheSpec(2, 6, 64, 16, fmt)
    meta = sentinel_meta(spec, **changes) if meta is None else meta
    layer = bare_layer(fmt, **(layer or {}))
    return get_backend(INT8, name=backend, ops=RecordingOps()).forward_mixed(qkv, layer, meta)


TEXTS = [
    # formats
    (
        lambda: quant_spec("cache_int9"),
        "quant_spec: name: expected one of none, cache_int8, cache_fp8, cache_int4_zp, "
        "block_wise_fp8, got 'cache_int9'. Did you mean 'cache_int8'?",
    ),
    (
        lambda: quant_spec(None, op="load", argument="format"),
        "load: format: expected one of none, cache_int8, cache_fp8, cache_int4_zp, "
        "block_wise_fp8, got None. Did you mean 'none'?",
    ),
    # the spec
    (
        lambda: CacheSpec(0, 6, 64, 16),
        "CacheSpec: num_layers: expected an integer of at least 1, got 0",
    ),
    (
        lambda: CacheSpec(2, 6, 63, 16, "cache_int4_zp"),
        "CacheSpec: head_dim (format cache_int4_zp): expected a multiple of 2, got 63",
    ),
    (
        lambda: CacheSpec(2, 6, 64, 16, dtype="int8"),
        "CacheSpec: dtype: expected one of bfloat16, float16, float32, got 'int8'",
    ),
    (
        lambda: CacheSpec(2, 6, 64, 16, ["none"]),
        "CacheSpec: quant: expected 2 formats, one a layer, got 1",
    ),
    (
        lambda: CacheSpec(2, 6, 64, 16, ["none", "int8"]),
        "CacheSpec: quant: expected one of none, cache_int8, cache_fp8, cache_int4_zp, "
        "block_wise_fp8, got 'int8'. Did you mean 'cache_int8'?",
    ),
    (
        lambda: CacheSpec(2, 6, 64, 16, 8),
        "CacheSpec: quant: expected one of none, cache_int8, cache_fp8, cache_int4_zp, "
        "block_wise_fp8, got 8. Did you mean 'cache_fp8'?",
    ),
    (
        lambda: INT8.layer_quant(2),
        "CacheSpec.layer_quant: layer_id: expected 0 to 1, got 2",
    ),
    (
        lambda: INT8.first_index(-1),
        "CacheSpec.first_index: layer_id: expected 0 to 1, got -1",
    ),
    (
        lambda: INT8.layer_tensors("0", 1),
        "CacheSpec.layer_tensors: layer_id: expected 0 to 1, got '0'",
    ),
    (
        lambda: INT8.layer_tensors(0, 0),
        "CacheSpec.layer_tensors: num_pages: expected an integer of at least 1, got 0",
    ),
    (
        lambda: INT8.allocate(0),
        "CacheSpec.allocate: num_pages: expected an integer of at least 1, got 0",
    ),
    (
        lambda: INT8.allocate(1, "nump"),
        "CacheSpec.allocate: library: expected one of numpy, torch, paddle, cupy, got "
        "'nump'. Did you mean 'numpy'?",
    ),
    (
        lambda: INT8.static_bytes("token"),
        "CacheSpec.static_bytes: granularity (format cache_int8): expected head or "
        "channel, got token",
    ),
    (
        lambda: INT8.bytes_per_token(0),
        "CacheSpec.bytes_per_token: tokens: expected an integer of at least 1, got 0",
    ),
    (
        lambda: INT8.shard(0, 0),
        "CacheSpec.shard: tp_size: expected an integer of at least 1, got 0",
    ),
    (
        lambda: INT8.shard(3, 3),
        "CacheSpec.shard: tp_rank: expected an integer, 0 <= tp_rank < tp_size, got rank 3 of 3",
    ),
    (
        lambda: INT8.kv_heads(0, 4),
        "CacheSpec.shard: tp_size: expected a divisor or a multiple of the 6 KV heads, got 4",
    ),
    # one layer of a list
    (
        lambda: resolved("cache_int8", layer_id=2),
        "resolve: layer.layer_id: expected an integer, 0 to 1, got 2",
    ),
    (
        lambda: resolve([], SimpleNamespace(), INT8),
        "resolve: layer.layer_id: expected an integer, 0 to 1, got no such attribute",
    ),
    (
        lambda: resolved("cache_int8", [1, 2, 3]),
        "resolve: caches (format cache_int8): expected a list of 4 tensors for 2 "
        "layers, got 3 tensors",
    ),
    (
        lambda: resolved("cache_int8", Sentinel("one tensor")),
        "resolve: caches (format cache_int8): expected a list of 4 tensors for 2 "
        "layers, got Sentinel",
    ),
    (
        lambda: resolved("cache_int8", [1, None, 2, 3]),
        "resolve: caches[1], layer 0's v (format cache_int8): expected a cache tensor "
        "[N, Hkv, P, D_storage], got None",
    ),
    (
        lambda: resolved("block_wise_fp8", [1, 2, None, 3, 4, 5, 6, 7]),
        "resolve: caches[2], layer 0's k_scale (format block_wise_fp8): expected "
        "dequant multipliers [N, Hkv, P], got None",
    ),
    (
        lambda: twice("cache_int8"),
        "resolve: caches[3], layer 1's v (format cache_int8): expected a tensor of its "
        "own, got the very tensor of caches[2], layer 1's k",
    ),
    (
        lambda: resolved("cache_int8", cache_quant_type_str="none"),
        "resolve: layer.cache_quant_type_str (format cache_int8): expected cache_int8, "
        "as the spec says for this layer, got none",
    ),
    (
        lambda: resolved("cache_int8", cache_quant_type_str=None),
        "resolve: layer.cache_quant_type_str (format cache_int8): expected cache_int8, "
        "as the spec says for this layer, got no name, which means none",
    ),
    (
        lambda: resolved("cache_int8", cache_quant_type_str="int8"),
        "resolve: layer.cache_quant_type_str: expected one of none, cache_int8, "
        "cache_fp8, cache_int4_zp, block_wise_fp8, got 'int8'. Did you mean "
        "'cache_int8'?",
    ),
    (
        lambda: resolved("cache_int8", cache_v_out_scale=None),
        "resolve: layer.cache_v_out_scale (format cache_int8): expected a tensor [Hkv] "
        "or [Hkv, D], or layer.static_scales, got None",
    ),
    (
        lambda: resolved("cache_int4_zp", cache_k_zp=None),
        "resolve: layer.cache_k_zp (format cache_int4_zp): expected a tensor [Hkv, D], "
        "or layer.static_scales, got None",
    ),
    (
        lambda: resolved("cache_int8", cache_k_zp=3),
        "resolve: layer.cache_k_zp (format cache_int8): expected None: the format has "
        "no zero points, got int",
    ),
    (
        lambda: resolved("none", cache_k_scale=3),
        "resolve: layer.cache_k_scale (format none): expected None: the format has no "
        "scales, got int",
    ),
    (
        lambda: resolved("none", static_scales=3),
        "resolve: layer.static_scales (format none): expected None: the format has no "
        "scales, got int",
    ),
    (
        lambda: resolved("block_wise_fp8", static_scales=3),
        "resolve: layer.static_scales (format block_wise_fp8): expected None: the "
        "format has dynamic scales, paged in the cache, got int",
    ),
    (
        lambda: resolved("cache_int8", static_scales=3),
        "resolve: layer.static_scales (format cache_int8): expected a StaticScales or "
        "None, got int",
    ),
    (
        lambda: resolved("cache_int8", static_scales=bundle()),
        "resolve: layer.cache_k_scale (format cache_int8): expected None: the layer "
        "has static_scales too, and which one would count?, got Sentinel",
    ),
    # a step
    (
        lambda: served("append", meta=[]),
        "append.forward_mixed: meta: expected a BatchMeta, got list",
    ),
    (
        lambda: served("append", meta=BatchMeta(None, None, None, None, None)),
        "append.forward_mixed: meta.spec: expected a CacheSpec, got None",
    ),
    (
        lambda: served("append", meta=BatchMeta([], 3, None, None, None)),
        "append.forward_mixed: meta.spec: expected a CacheSpec, got int",
    ),
    (
        lambda: served("flash", caches=None),
        "flash.forward_mixed: meta.caches: expected the engine's list of cache tensors, got None",
    ),
    (
        lambda: served("flash", qkv=None),
        "flash.forward_mixed: qkv (format cache_int8): expected a tensor [T, (Hq + "
        "2*Hkv) * D], got None",
    ),
    (
        lambda: served("flash", cu_seqlens_k=None),
        "flash.forward_mixed: meta.cu_seqlens_k (format cache_int8): expected an int32 "
        "tensor [B+1], got None",
    ),
    (
        lambda: served("flash_mask", total_k=None),
        "flash_mask.forward_mixed: meta.total_k (format cache_int8): expected "
        "cu_seqlens_k[B] on the host, got None",
    ),
    (
        lambda: served("flash", mask_offsets=Sentinel("mask_offsets")),
        "flash.forward_mixed: mask_offsets_on_prefill: expected a batch without "
        "mask_offsets_on_prefill, got one with it: flash-attention libraries take no "
        "interval of keys per row; select flash_mask or append",
    ),
    (
        lambda: served("append", layer={"sliding_window": -1}),
        "append.forward_mixed: layer.sliding_window (format cache_int8): expected None "
        "or an integer of at least 0, got -1",
    ),
    (
        lambda: served("append", layer={"soft_cap": "3"}),
        "append.forward_mixed: layer.soft_cap (format cache_int8): expected None or a "
        "finite number of at least 0, got str",
    ),
    (
        lambda: served("append", layer={"softmax_scale": float("nan")}),
        "append.forward_mixed: layer.softmax_scale (format cache_int8): expected None "
        "or a finite number, got nan",
    ),
    (
        lambda: served("append", layer={"rms_norm_eps": -1.0}),
        "append.forward_mixed: layer.rms_norm_eps (format cache_int8): expected None "
        "or a finite number of at least 0, got -1.0",
    ),
    # selection
    (
        lambda: Device.of("gpu"),
        "select_backend: device: expected 'cpu' or 'cuda:90' (9.0), got 'gpu'",
    ),
    (
        lambda: select_backend("flahs", INT8),
        "select_backend: name: expected one of append, flash_mask, flash, auto, got "
        "'flahs'. Did you mean 'flash'?",
    ),
    (
        lambda: select_backend("auto", INT8, features=["windows"]),
        "select_backend: features: expected one of window, soft_cap, sinks, "
        "mask_offsets_on_prefill, mask_offsets_on_decode, got 'windows'. Did you mean "
        "'window'?",
    ),
    (
        lambda: name_from_environment({"FASTKV_ATTENTION_BACKEND": "flahs"}),
        "name_from_environment: FASTKV_ATTENTION_BACKEND: expected one of append, "
        "flash_mask, flash, auto, got 'flahs'. Did you mean 'flash'?",
    ),
    (
        lambda: select_backend("flash", INT8, features=["sinks", "mask_offsets_on_prefill"]),
        "select_backend: no backend serves 'flash' on cpu with "
        "mask_offsets_on_prefill, sinks: flash: no mask_offsets_on_prefill: "
        "flash-attention libraries take no interval of keys per row; select flash_mask "
        "or append",
    ),
    (
        lambda: select_backend("append", INT8, Device("tpu")),
        "select_backend: no backend serves 'append' on tpu: append: no kernels for a tpu device",
    ),
]


@pytest.mark.parametrize(("call", "text"), TEXTS)
def test_text(call, text):
    with pytest.raises(FastKVError) as caught:
        call()
    assert str(caught.value) == text
