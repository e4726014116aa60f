# SPDX-License-Identifier: Apache-2.0
"""What the ops of `fastkv.integrations.fastdeploy` refuse: by name, before anything is written."""

import numpy as np
import paddle
import pytest

from fastkv import arrays
from fastkv.backends import resolve
from fastkv.errors import (
    ContractError,
    MissingTensorError,
    PlacementError,
    ShapeError,
    SurplusTensorError,
    UnsupportedError,
)
from fastkv.integrations import fastdeploy
from helpers.batches import running_sum
from helpers.fastdeploy_engine import MIXTURE, Engine, tensor
from helpers.sentinels import FORMATS, STATIC


def int32(*values):
    return paddle.to_tensor(np.array(values, np.int32))


def step(fmt="cache_int8"):
    """A step of a fresh engine, with the arguments of append_attention and gqa_rope_write_cache."""
    engine = Engine(np.random.default_rng(4), "append", fmt)
    qkv = engine.tokens(MIXTURE[0])
    engine.last = engine.meta(MIXTURE[0])
    meta = engine.forward_meta(qkv, engine.last)
    layer = engine.engine_layer
    cache = resolve(meta.caches, layer, engine.spec)
    plan = dict.fromkeys(
        f"{stage}_{name}"
        for stage in ("encoder", "kv", "decoder")
        for name in ("batch_ids", "tile_ids_per_batch", "num_blocks")
    )
    common = {"qkv": tensor(qkv), "key_cache": cache.k, "value_cache": cache.v}
    names = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "cu_seqlens_q")
    common |= {name: getattr(meta, name) for name in (*names, "block_tables", "rotary_embs")}
    common |= {"batch_id_per_token": None, "cache_quant_type": fmt}
    lengths = int32(7, 7, 0, 7, 0, 0)
    append = common | plan | {"set_max_lengths": lengths}
    tiles = ("kv_batch_ids", "kv_tile_ids_per_batch", "kv_num_blocks", "cache_batch_ids")
    write = common | dict.fromkeys((*tiles, "cache_tile_ids_per_batch", "cache_num_blocks"))
    new = np.diff(meta.cu_seqlens_q.numpy())
    write |= {"cu_seqlens_k": int32(*running_sum(new)), "kv_token_num": int(new.sum())}
    for name in STATIC[fmt]:
        side = name.split("_")[1]
        kind = {"scale": "quant", "out_scale": "dequant", "zp": "zp"}[name.split("_", 2)[2]]
        append[f"{side}_{kind}_scale" if kind != "zp" else name] = getattr(layer, name)
        write[f"cache_{side}_{kind}_scales" if kind != "zp" else name] = getattr(layer, name)
    return engine, append, write


TENSOR = paddle.ones([2])
UNSERVED = [
    *(("append_attention", name, TENSOR) for name in ("attn_mask", "qkv_scale", "linear_shift")),
    *(("append_attention", name, TENSOR) for name in ("linear_smooth", "kv_signal_data")),
    *(("append_attention", name, 4) for name in ("sink_size", "head_wise_full_hidden")),
    ("append_attention", "rope_3d", True),
    ("append_attention", "out_linear_in_scale", 0.5),
    ("gqa_rope_write_cache", "kv_signal_data", TENSOR),
    ("gqa_rope_write_cache", "rope_3d", True),
]


@pytest.mark.parametrize(("op", "name", "value"), UNSERVED)
def test_what_is_not_served_is_named_when_it_is_set(op, name, value):
    engine, append, write = step()
    given = append if op == "append_attention" else write
    before = [cache.copy() for cache in engine.caches]
    with pytest.raises(UnsupportedError) as caught:
        getattr(fastdeploy, op)(**given, **{name: value})
    error = caught.value
    assert (error.op, error.argument, error.format) == (op, name, "cache_int8")
    assert "fastkv does not serve it" in str(error)
    for cache, want in zip(engine.caches, before, strict=True):
        assert (cache.view("u1") == want.view("u1")).all()
    unset = (
        {True: False, 4: 0, 0.5: -1.0}.get(value) if not isinstance(value, paddle.Tensor) else None
    )
    getattr(fastdeploy, op)(**given, **{name: unset})


def of_format(fmt):
    """Arguments of append_attention in a format; paged scales of the dynamic one included."""
    engine, append, _ = step(fmt)
    if fmt == "block_wise_fp8":
        append["k_quant_scale"], append["v_quant_scale"] = (
            engine.forward_meta(engine.tokens(MIXTURE[0]), engine.last).caches[i] for i in (6, 7)
        )
    return append


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_tensor_that_the_format_needs_is_missed(fmt):
    append = of_format(fmt)
    scales = [name for name in append if name.endswith(("_scale", "_zp"))]
    assert len(scales) == {"none": 0, "cache_int4_zp": 6, "block_wise_fp8": 2}.get(fmt, 4)
    for name in ("key_cache", "value_cache", *scales):
        with pytest.raises(MissingTensorError) as caught:
            fastdeploy.append_attention(**(append | {name: None}))
        error = caught.value
        assert (error.op, error.argument, error.format) == ("append_attention", name, fmt)
        assert error.got == "None"


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_tensor_that_the_format_has_no_use_for_is_refused(fmt):
    append = of_format(fmt)
    names = ["cache_k_zp", "cache_v_zp"] if fmt != "cache_int4_zp" else []
    if fmt == "none":
        names += [f"{side}_{kind}_scale" for side in "kv" for kind in ("quant", "dequant")]
    for name in names:
        with pytest.raises(SurplusTensorError) as caught:
            fastdeploy.append_attention(**(append | {name: TENSOR}))
        error = caught.value
        assert (error.op, error.argument, error.format) == ("append_attention", name, fmt)


@pytest.mark.parametrize("op", ["append_attention", "gqa_rope_write_cache"])
@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("qkv", None, "None"),
        ("qkv", paddle.zeros([14, 160], "int32"), "int32"),
        ("qkv", paddle.zeros([14]), "[14]"),
        ("qkv", paddle.zeros([14, 150]), "[14, 150]"),
        ("seq_lens_this_time", None, "None"),
        ("seq_lens_encoder", None, "None"),
        ("block_tables", None, "None"),
        ("cu_seqlens_q", paddle.zeros([7], "int64"), "int64"),
        ("value_cache", paddle.zeros([40, 2, 4, 8], "uint8"), "[40, 2, 4, 8]"),
        ("key_cache", paddle.zeros([40, 2, 4, 16], "int16"), "int16"),
        ("rotary_embs", paddle.zeros([2, 1, 32, 1, 12]), "[2, 1, 32, 1, 12]"),
        ("rotary_embs", paddle.zeros([2, 1, 32, 8]), "[2, 1, 32, 8]"),
        ("rms_norm_eps", -1.0, "-1.0"),
    ],
)
def test_bad_arguments_are_named_by_both_ops_that_write(op, name, value, got):
    engine, append, write = step()
    given = (append if op == "append_attention" else write) | {name: value}
    before = [cache.copy() for cache in engine.caches]
    with pytest.raises(ContractError) as caught:
        getattr(fastdeploy, op)(**given)
    error = caught.value
    assert (error.op, error.argument, error.format, error.got) == (op, name, "cache_int8", got)
    for cache, want in zip(engine.caches, before, strict=True):
        assert (cache.view("u1") == want.view("u1")).all()


def test_the_output_is_checked_before_anything_is_written():
    engine, append, _ = step()
    before = [cache.copy() for cache in engine.caches]
    rows = append["qkv"].shape[0]
    for out, text in (
        (None, "out .*expected a tensor"),
        (paddle.zeros([rows, 7]), "out .*expected .14, 96., got .14, 7."),
        (paddle.zeros([rows, 96], "float16"), "out .*expected float32, got float16"),
        (paddle.zeros([96, rows]).t(), "out .*expected a dense tensor"),
    ):
        with pytest.raises(ContractError, match=text) as caught:
            fastdeploy.append_attention_with_output(**append, out=out)
        assert caught.value.op == "append_attention_with_output"
    for lengths, kind in (
        (int32(3), ShapeError),
        (paddle.zeros([6]), ContractError),
        (None, MissingTensorError),
    ):
        with pytest.raises(kind, match="set_max_lengths"):
            fastdeploy.append_attention(**(append | {"set_max_lengths": lengths}))
    for cache, want in zip(engine.caches, before, strict=True):
        assert (cache.view("u1") == want.view("u1")).all()


def test_gqa_needs_the_number_of_its_rows():
    _, _, write = step()
    for total, text in ((int32(14), "got Tensor"), (-1, "got -1"), (True, "got bool")):
        with pytest.raises(ContractError, match=f"kv_token_num .*{text}"):
            fastdeploy.gqa_rope_write_cache(**(write | {"kv_token_num": total}))
    with pytest.raises(
        ContractError, match=r"gqa_rope_write_cache: cu_seqlens_k\[3\] of request 2"
    ):
        fastdeploy.gqa_rope_write_cache(**(write | {"kv_token_num": 11}))


def test_lengths_on_a_device_are_refused(mocker):
    _, append, _ = step()
    real = arrays.describe

    def on_gpu(array, op="", argument=""):
        info = real(array, op, argument)
        return info._replace(device="cuda:0") if argument == "set_max_lengths" else info

    mocker.patch("fastkv.arrays.describe", on_gpu)
    with pytest.raises(PlacementError, match=r"set_max_lengths .*a tensor on the CPU, got cuda:0"):
        fastdeploy.append_attention(**append)
