# SPDX-License-Identifier: Apache-2.0
"""FastDeploy's backends, rebuilt call by call, over fastkv's ops on the CPU, against float64."""

import numpy as np
import paddle
import pytest

from fastkv.errors import ContractError
from helpers.compare import assert_same_bits, bits
from helpers.fastdeploy_engine import BACKENDS, EXACT, MIXTURE, STYLES, Engine, Gathered, tensor
from helpers.sentinels import FORMATS

every_backend = pytest.mark.parametrize("backend", BACKENDS)
#: One that reads every key as it is stored, and one that gathers.
either_kind = pytest.mark.parametrize("backend", ["append", "flash_mask"])
every_format = pytest.mark.parametrize("fmt", FORMATS)
OWN = ("fastkv:append", "fastkv:flash", "fastkv:flash_mask")
ROWS = sum(entry[1] for step in MIXTURE for entry in step.entries)


def gathered(steps):
    return tuple(Gathered(step.decode, step.prefill) for step in steps)


def test_the_mixture_interleaves():
    orders = [[step.is_decode(b) for b in range(len(step.entries))] for step in MIXTURE]
    assert orders[1] == [False, True, False, True, False, True]
    assert sum(sorted(order, reverse=True) != order for order in orders) == 3
    for step in MIXTURE:
        assert sorted(step.entries) == sorted([*step.decode, *step.prefill])


def style_of(backend, fmt):
    """Each backend and each format meets each style."""
    return list(STYLES)[(BACKENDS.index(backend) + FORMATS.index(fmt)) % 3]


@every_backend
@every_format
def test_mixture(backend, fmt):
    style = style_of(backend, fmt)
    seen = Engine(np.random.default_rng(7), backend, fmt, style=style).run(MIXTURE)
    assert seen.rows == ROWS
    # The comparison can tell exact new tokens from what the cache holds of them.
    assert (seen.exact > 10) == EXACT[backend]


@pytest.mark.parametrize("backend", OWN)
@every_format
def test_own_backends_take_the_engines_layer_and_batch(backend, fmt):
    style = list(STYLES)[FORMATS.index(fmt) % 3]
    seen = Engine(np.random.default_rng(8), backend, fmt, style=style).run(gathered(MIXTURE))
    assert seen.rows == ROWS


@either_kind
@every_format
@pytest.mark.parametrize("layer_id", [0, 2])
def test_first_and_last_layer(backend, fmt, layer_id):
    assert Engine(np.random.default_rng(9), backend, fmt, layer_id=layer_id).run(MIXTURE[:2]).rows


@either_kind
@every_format
def test_bytes_are_exact_where_nothing_is_rotated(backend, fmt):
    engine = Engine(np.random.default_rng(10), backend, fmt, rotated=False)
    assert engine.run(MIXTURE[:3]).rows


@pytest.mark.parametrize("style", STYLES)
@every_backend
def test_rope_without_norm(backend, style):
    engine = Engine(np.random.default_rng(11), backend, "cache_fp8", style=style, normed=False)
    assert engine.run(MIXTURE[:3]).rows


@either_kind
@pytest.mark.parametrize("fmt", ["none", "cache_int4_zp", "block_wise_fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(backend, fmt, dtype):
    assert Engine(np.random.default_rng(12), backend, fmt, dtype=dtype).run(MIXTURE[:4]).rows


@pytest.mark.parametrize("backend", ["append", "append_into", "fastkv:append", "fastkv:flash_mask"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bias(backend, dtype):
    engine = Engine(np.random.default_rng(13), backend, "cache_int8", bias=True, dtype=dtype)
    assert engine.run(gathered(MIXTURE[:3])).rows


@pytest.mark.parametrize("backend", ["append", "append_into", "fastkv:append", "fastkv:flash"])
def test_window_and_sinks(backend):
    rng = np.random.default_rng(14)
    # Values that bfloat16 holds, since the engine keeps the sinks so.
    sinks = rng.integers(-8, 9, 6).astype(np.float32) / 4
    engine = Engine(rng, backend, "cache_int8", sliding_window=4, sinks=sinks)
    seen = engine.run(gathered(MIXTURE))
    assert seen.rows
    assert seen.changed > 10


@pytest.mark.parametrize("backend", ["append", "append_into", "flash_mask", *OWN[::2]])
@pytest.mark.parametrize("fmt", ["cache_fp8", "block_wise_fp8"])
def test_intervals_stand_in_place_of_causality(backend, fmt):
    engine = Engine(np.random.default_rng(15), backend, fmt)
    seen = engine.run(gathered(MIXTURE) if engine.own else MIXTURE, masked=lambda step: True)
    assert seen.rows
    assert seen.changed > 10


@pytest.mark.parametrize("backend", ["append", *OWN[::2]])
def test_a_window_counts_from_the_end_of_an_interval(backend):
    engine = Engine(np.random.default_rng(16), backend, "cache_int8", sliding_window=3)
    assert engine.run(gathered(MIXTURE), masked=lambda step: True).changed > 10


@pytest.mark.parametrize("backend", ["append", "flash", "fastkv:append", "fastkv:flash"])
def test_not_causal(backend):
    engine = Engine(np.random.default_rng(17), backend, "none", causal=False)
    assert engine.run(gathered(MIXTURE[:3]) if engine.own else MIXTURE[:3]).changed > 10


OLDER = [("flash", ("neox",)), ("flash", ("norm", "eps", "neox")), ("flash", ("encoder",))]
OLDER += [("flash_mask", ("counts",)), ("flash_mask", ("encoder", "counts"))]


@pytest.mark.parametrize(("backend", "omitted"), OLDER)
@pytest.mark.parametrize("fmt", ["cache_int8", "block_wise_fp8"])
def test_calls_of_older_versions(backend, omitted, fmt):
    rng = np.random.default_rng(18)
    engine = Engine(rng, backend, fmt, omitted=omitted, style="neox", normed="norm" not in omitted)
    assert engine.run(MIXTURE[:5]).rows


class Full(Engine):
    """The sizes of the engine's kernels."""

    heads, query_heads, dim, page = 1, 4, 128, 64


@pytest.mark.parametrize("backend", ["append", "flash_mask"])
@every_format
def test_the_engines_head_dim_and_page_size(backend, fmt):
    assert Full(np.random.default_rng(19), backend, fmt, dtype="bfloat16").run(MIXTURE[:2]).rows


class Coincident(Engine):
    """As many pages as channels: paged scales are not taken for multipliers per channel."""

    dim = 20


@either_kind
@pytest.mark.parametrize("fmt", ["block_wise_fp8", "cache_int8"])
def test_as_many_pages_as_channels(backend, fmt):
    engine = Coincident(np.random.default_rng(27), backend, fmt)
    assert len(engine.caches[0]) == engine.heads * engine.dim
    assert engine.run(MIXTURE[:3]).rows


@pytest.mark.parametrize("backend", [*BACKENDS, *OWN])
@pytest.mark.parametrize("requests", [0, 3])
@pytest.mark.parametrize("padding", [0, 2])
def test_a_batch_of_nothing(backend, requests, padding):
    engine = Engine(np.random.default_rng(26), backend, "cache_int8")
    step = Gathered(prefill=tuple((r, 0) for r in range(requests)))
    before = [bits(cache) for cache in engine.caches]
    for offsets in (None, np.zeros((padding, 2), np.int32)):
        if offsets is not None and backend.endswith("flash"):
            continue
        out = engine._forward(engine.tokens(step)[:padding], engine.meta(step, 0, offsets))
        assert out.shape == (padding, 6, 16)
        assert not out.any()
    for cache, want in zip(engine.caches, before, strict=True):
        assert_same_bits(cache, want)


# Bad input, through the rebuilt backends: nothing has been written


def broken(engine, change):
    """The error of a step with a changed layer or batch, and proof that no byte changed."""
    engine.run(MIXTURE[:1])
    step = MIXTURE[1]
    qkv = engine.tokens(step)
    forward_meta = engine.forward_meta(qkv, engine.meta(step))
    change(engine.engine_layer, forward_meta)
    before = [bits(cache) for cache in engine.caches]
    with pytest.raises(ContractError) as caught:
        engine.run_backend(engine.config, tensor(qkv), engine.engine_layer, forward_meta)
    for cache, want in zip(engine.caches, before, strict=True):
        assert_same_bits(cache, want)
    return caught.value


WRITES = {"append": "append_attention", "flash": "gqa_rope_write_cache"}
WRITES |= {"append_into": "append_attention_with_output", "flash_mask": "gqa_rope_write_cache"}
SCALES = {
    "cache_k_scale": ("k_quant_scale", "cache_k_quant_scales"),
    "cache_v_scale": ("v_quant_scale", "cache_v_quant_scales"),
    "cache_k_out_scale": ("k_dequant_scale", "cache_k_dequant_scales"),
    "cache_v_out_scale": ("v_dequant_scale", "cache_v_dequant_scales"),
    "cache_k_zp": ("cache_k_zp", "cache_k_zp"),
    "cache_v_zp": ("cache_v_zp", "cache_v_zp"),
}


@either_kind
@pytest.mark.parametrize("name", SCALES)
def test_a_missing_scale_is_named(backend, name):
    engine = Engine(np.random.default_rng(20), backend, "cache_int4_zp")
    error = broken(engine, lambda layer, meta: setattr(layer, name, None))
    argument = SCALES[name][backend.startswith("flash")]
    assert (error.op, error.argument) == (WRITES[backend], argument)
    assert (error.format, error.got) == ("cache_int4_zp", "None")


@either_kind
@pytest.mark.parametrize(
    ("fmt", "shape"),
    [
        ("cache_int4_zp", [2]),
        ("cache_fp8", [8]),
        ("cache_int8", [2, 1]),
        ("cache_int8", [12, 2, 4]),
    ],
    ids=["int4 per head", "fp8 of all ranks", "int8 odd", "paged"],
)
def test_scales_of_another_shape_are_named(backend, fmt, shape):
    scales = paddle.ones(shape, "bfloat16")
    engine = Engine(np.random.default_rng(21), backend, fmt)
    error = broken(engine, lambda layer, meta: setattr(layer, "cache_v_out_scale", scales))
    argument = SCALES["cache_v_out_scale"][backend.startswith("flash")]
    assert (error.op, error.argument, error.format) == (WRITES[backend], argument, fmt)
    assert error.got == str(shape)


@every_backend
def test_scales_that_were_never_filled_are_refused(backend):
    engine = Engine(np.random.default_rng(22), backend, "cache_int8")
    zeros = paddle.zeros([32], "bfloat16")
    error = broken(engine, lambda layer, meta: setattr(layer, "cache_k_out_scale", zeros))
    assert (error.op, error.format) == (WRITES[backend], "cache_int8")
    assert error.argument.startswith(SCALES["cache_k_out_scale"][backend.startswith("flash")])


@every_backend
@pytest.mark.parametrize("fmt", ["none", "cache_int8"])
def test_a_list_of_the_other_kind_of_format_is_refused(backend, fmt):
    # Four tensors a layer, indexed as two: layer 1's K and V are layer 0's scales.
    engine = Engine(np.random.default_rng(23), backend, "block_wise_fp8")

    def change(layer, meta):
        layer.cache_quant_type_str = fmt
        for name in list(SCALES)[:4]:
            setattr(layer, name, None if fmt == "none" else paddle.ones([2]))

    error = broken(engine, change)
    assert (error.op, error.argument) == (WRITES[backend], "key_cache")
    assert (error.format, error.got) == (fmt, "[40, 2, 4]")


@either_kind
@pytest.mark.parametrize(
    ("field", "change", "argument"),
    [
        ("block_tables", lambda t: paddle.where(t >= 0, t + 99, t), "block_tables"),
        ("block_tables", lambda t: t[:2], "block_tables"),
        ("block_tables", lambda t: t.astype("int64"), "block_tables"),
        ("seq_lens_decoder", lambda t: t + 24, "seq_lens_decoder"),
        ("seq_lens_decoder", lambda t: t.astype("int64"), "seq_lens_decoder"),
        ("seq_lens_encoder", lambda t: t[:3], "seq_lens_encoder"),
        ("cu_seqlens_q", lambda t: t[:-1], "cu_seqlens_q"),
        ("rotary_embs", lambda t: t[:, :, :3], "rotary_embs"),
        ("rotary_embs", lambda t: t.astype("float64"), "rotary_embs"),
        ("rotary_embs", lambda t: paddle.concat([t, t], axis=4)[..., :10], "rotary_embs"),
        ("rotary_embs", lambda t: t.unsqueeze(0), "rope_3d"),
    ],
)
def test_bad_batches_are_named(backend, field, change, argument):
    engine = Engine(np.random.default_rng(24), backend, "cache_int8")
    error = broken(engine, lambda layer, meta: setattr(meta, field, change(getattr(meta, field))))
    assert error.argument.split("[")[0].split(" ")[0] == argument
    prepares = ("get_block_shape_and_split_kv_block", "pre_cache_len_concat")
    assert error.op in (WRITES[backend], *prepares)


@pytest.mark.parametrize("backend", ["append", "append_into"])
@pytest.mark.parametrize(
    ("name", "value", "argument"),
    [
        ("attn_mask_offsets", paddle.zeros([3], "int32"), "mask_offset"),
        ("attn_mask_offsets", paddle.full([38], 9, "int64"), "mask_offset"),
        ("sinks", paddle.zeros([5]), "sinks"),
        ("qkv_bias", paddle.zeros([5]), "qkv_bias"),
        ("sliding_window", -1, "sliding_window"),
        ("sliding_window", 2.5, "sliding_window"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps"),
        ("q_norm_weight", None, "q_norm_weight"),
        ("k_norm_weight", paddle.ones([15]), "k_norm_weight"),
        ("use_neox_rotary_style", True, "use_neox_rotary_style"),
        ("cache_quant_type_str", "cache_int9", "cache_quant_type"),
    ],
)
def test_what_only_a_later_op_would_refuse_is_refused_before_the_write(
    backend, name, value, argument
):
    engine = Engine(np.random.default_rng(25), backend, "cache_int8")

    def change(layer, meta):
        setattr(meta if name == "attn_mask_offsets" else layer, name, value)

    error = broken(engine, change)
    assert (error.op, error.argument) == (WRITES[backend], argument)
