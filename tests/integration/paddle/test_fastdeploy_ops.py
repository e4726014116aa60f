# SPDX-License-Identifier: Apache-2.0
"""The ops of `fastkv.integrations.fastdeploy`, each on its own, on Paddle tensors on the CPU."""

from types import ModuleType, SimpleNamespace

import numpy as np
import paddle
import pytest

from fastkv import CacheSpec, arrays
from fastkv.backends import resolve
from fastkv.errors import (
    ContractError,
    MissingTensorError,
    PlacementError,
    ShapeError,
    SpecMismatchError,
    SurplusTensorError,
    UnknownNameError,
    UnsupportedError,
)
from fastkv.integrations import fastdeploy
from helpers import oracle
from helpers.batches import floats, running_sum
from helpers.fastdeploy_engine import MIXTURE, Engine, tensor
from helpers.sentinels import FORMATS, STATIC

HEADS, KV_HEADS, DIM = 6, 2, 8


def int32(*values):
    return paddle.to_tensor(np.array(values, np.int32))


# pre_cache_len_concat

ENCODER, DECODER, THIS_TIME = (0, 5, 0, 3, 0, 2), (9, 8, 0, 0, 7, 130), (1, 5, 0, 3, 0, 2)


def test_pre_cache_len_concat():
    found = fastdeploy.pre_cache_len_concat(
        int32(*ENCODER, -3), int32(*DECODER, 5), int32(*THIS_TIME), 130, 64
    )
    sums, owners, tiles, blocks, total = found
    # Decode has its new token alone; idle requests have nothing.
    assert sums.tolist() == [0, 1, 14, 14, 17, 17, 149]
    assert list(zip(owners.tolist(), tiles.tolist(), strict=True)) == [
        (1, 0),
        (5, 0),
        (5, 1),
        (5, 2),
    ]
    assert (blocks.tolist(), total.tolist()) == ([4], [149])
    assert {str(t.dtype) for t in found} == {"paddle.int32"}


def test_pre_cache_len_concat_of_older_versions_gives_decode_its_prefix():
    sums, owners, *_, total = fastdeploy.pre_cache_len_concat(
        int32(*DECODER), int32(*THIS_TIME), 130, 64
    )
    assert sums.tolist() == [0, 10, 23, 23, 26, 26, 158]
    assert owners.tolist() == [0, 1, 5, 5, 5]
    assert total.item() == 158


def test_pre_cache_len_concat_of_nothing():
    empty = paddle.zeros([0], "int32")
    sums, owners, _, blocks, total = fastdeploy.pre_cache_len_concat(empty, empty, empty, 0, 64)
    assert (sums.tolist(), owners.tolist(), blocks.tolist(), total.tolist()) == ([0], [], [0], [0])


# get_block_shape_and_split_kv_block


def buffers(size=99):
    names = ("decoder_batch_ids", "decoder_tile_ids_per_batch", "decoder_num_blocks_cpu")
    names += ("decoder_num_blocks_device", "decoder_chunk_size_device", "max_len_tensor_cpu")
    names += ("encoder_batch_ids", "encoder_tile_ids_per_batch", "encoder_num_blocks_x_cpu")
    names += ("kv_batch_ids", "kv_tile_ids_per_batch", "kv_num_blocks_x_cpu")
    return {name: paddle.full([1 if "num" in name else size], -5, "int32") for name in names}


def test_the_step_is_prepared():
    given = buffers()
    lengths = (int32(*ENCODER), int32(*DECODER), int32(*THIS_TIME))
    fastdeploy.get_block_shape_and_split_kv_block(*lengths, *given.values(), 4, 2, 3, 64)
    # this time, prompt, cached; then of running requests: all, cached of decode, all with a cache
    assert given["max_len_tensor_cpu"].tolist()[:7] == [5, 5, 130, 132, 9, 132, -5]
    assert given["decoder_chunk_size_device"].tolist() == [-5] * 99
    tiles = {}
    for stage, count in (("encoder", 9), ("decoder", 2), ("kv", 3)):
        suffix = "_cpu" if stage == "decoder" else "_x_cpu"
        assert given[f"{stage}_num_blocks{suffix}"].tolist() == [count]
        owners = given[f"{stage}_batch_ids"].tolist()
        assert owners[count:] == [-5] * (99 - count)
        numbers = given[f"{stage}_tile_ids_per_batch"].tolist()
        tiles[stage] = list(zip(owners[:count], numbers[:count], strict=True))
    assert given["decoder_num_blocks_device"].tolist() == [2]
    assert tiles["encoder"] == [(1, i) for i in range(4)] + [(3, i) for i in range(3)] + [
        (5, 0),
        (5, 1),
    ]
    assert tiles["decoder"] == [(0, 0), (0, 1)]
    assert tiles["kv"] == [(1, 0), (3, 0), (5, 0)]


def test_the_plan_may_be_left_out():
    given = dict.fromkeys(buffers())
    given["max_len_tensor_cpu"] = paddle.zeros([6], "int32")
    lengths = (int32(0, 0), int32(4, 9), int32(1, 2))
    fastdeploy.get_block_shape_and_split_kv_block(*lengths, *given.values(), 4, 2, 3, 64)
    assert given["max_len_tensor_cpu"].tolist() == [2, 0, 9, 11, 9, 11]


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("kv_batch_ids", paddle.zeros([2], "int32"), ShapeError),
        ("encoder_batch_ids", paddle.zeros([99], "int64"), ContractError),
        ("max_len_tensor_cpu", paddle.zeros([5], "int32"), ShapeError),
        ("max_len_tensor_cpu", None, MissingTensorError),
        ("group_size", 0, ContractError),
        ("block_size", paddle.ones([1]), ContractError),
    ],
)
def test_a_bad_buffer_is_named_before_any_is_written(name, value, kind):
    numbers = {"encoder_block_shape_q": 4, "decoder_block_shape_q": 2}
    numbers |= {"group_size": 3, "block_size": 64}
    given = buffers() | numbers | {name: value}
    with pytest.raises(kind) as caught:
        fastdeploy.get_block_shape_and_split_kv_block(
            int32(*ENCODER), int32(*DECODER), int32(*THIS_TIME), *given.values()
        )
    assert caught.value.op == "get_block_shape_and_split_kv_block"
    assert caught.value.argument == name
    for key, buffer in given.items():
        if isinstance(buffer, paddle.Tensor) and key != name:
            assert (buffer == -5).all()


# merge_prefill_decode_output


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_merge_takes_the_decode_rows(dtype):
    rng = np.random.default_rng(0)
    new = np.array([1, 3, 0, 2, 4, 1])
    encoder, decoder = np.array([0, 3, 0, 0, 0, 1]), np.array([5, 0, 7, 6, 0, 9])
    rows = int(new.sum()) + 2
    prefilled, decoded = (floats(rng, (rows, HEADS * DIM), dtype) for _ in range(2))
    into = tensor(prefilled)
    fastdeploy.merge_prefill_decode_output(
        *(into, tensor(decoded), int32(*encoder)[:, None], int32(*decoder, -1), int32(*new)),
        *(int32(*running_sum(new)), HEADS, DIM, 4),
    )
    want = prefilled.copy()
    # Requests 0 and 3 decode; request 4 has neither prompt nor cache, and stays.
    for row in (0, 4, 5):
        want[row] = decoded[row]
    assert (arrays.to_host(into).view("u1") == want.view("u1")).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("encoder_res", lambda t: t[:, 1:]),
        ("decoder_res", lambda t: t[1:]),
        ("decoder_res", lambda t: t.astype("float16")),
        ("decoder_res", lambda t: None),
        ("cu_seq_q", lambda t: t[1:]),
        ("seq_lens_decoder", lambda t: t[1:]),
    ],
)
def test_merge_names_what_does_not_fit(name, change):
    given = {"encoder_res": paddle.zeros([3, 48]), "decoder_res": paddle.ones([3, 48])}
    given |= {"seq_lens_encoder": int32(0, 0), "seq_lens_decoder": int32(5, 5)}
    given |= {"seq_lens_this_time": int32(1, 2), "cu_seq_q": int32(0, 1, 3)}
    into = given["encoder_res"]
    given[name] = change(given[name])
    with pytest.raises(ContractError) as caught:
        fastdeploy.merge_prefill_decode_output(*given.values(), HEADS, DIM, 2)
    assert (caught.value.op, caught.value.argument) == ("merge_prefill_decode_output", name)
    assert not into.any()


# flash_mask_attention


def attended(rng, dtype="float32"):
    """A prefill, a decode, an idle and a prefill request over a prefix."""
    new, keys = [4, 1, 0, 3], [4, 1, 0, 9]
    q, out = (floats(rng, (10, HEADS, DIM), dtype) for _ in range(2))
    k, v = (floats(rng, (14, KV_HEADS, DIM), dtype) for _ in range(2))
    return SimpleNamespace(
        **{"q": q, "k": k, "v": v, "out": out.reshape(10, -1)},
        **{"cu_q": running_sum(new), "cu_k": running_sum(keys), "encoder": [4, 0, 0, 3]},
    )


def flash_mask(x, offsets=None, *counts):
    out = tensor(x.out)
    fastdeploy.flash_mask_attention(
        *(tensor(x.q), tensor(x.k), tensor(x.v), int32(*x.cu_q), int32(*x.cu_k)),
        *(int32(*x.encoder, 8, 8)[:, None], out, offsets, HEADS, KV_HEADS, DIM, *counts),
    )
    return arrays.to_host(out)


@pytest.mark.parametrize("form", ["none", "flat", "pairs", "ends"])
def test_flash_mask_attention_writes_prefill_rows_alone(form):
    rng = np.random.default_rng(1)
    x = attended(rng)
    offsets = np.full((10, 2), (77, 99), np.int32)  # of decode and padding rows: nonsense
    offsets[:4] = [[0, 4], [1, 4], [2, 2], [0, 1]]
    offsets[5:8] = [[0, 9], [3, 9], [8, 9]]
    if form == "ends":
        offsets[:, 0] = 0
    shaped = {"none": None, "flat": offsets.reshape(-1), "pairs": offsets, "ends": offsets[:, 1]}
    given = None if form == "none" else tensor(shaped[form])
    counts = () if form == "pairs" else (4096, 10, 14)
    found = flash_mask(x, given, *counts)
    for b in (0, 3):
        rows, keys = slice(x.cu_q[b], x.cu_q[b + 1]), slice(x.cu_k[b], x.cu_k[b + 1])
        n, length = rows.stop - rows.start, keys.stop - keys.start
        seen = None if form == "none" else offsets[rows]
        mask = oracle.visible_mask(n, length, form == "none", None, seen)
        want, _ = oracle.attention(x.q[rows], x.k[keys], x.v[keys], mask, DIM**-0.5)
        assert np.abs(found[rows] - want.reshape(n, -1)).max() < 1e-5
        x.out[rows] = found[rows]
    assert (found == x.out).all()


def test_flash_mask_attention_names_what_does_not_fit():
    x = attended(np.random.default_rng(2))
    for name, change in (
        ("q", {"q": x.q[..., :4]}),
        ("k", {"k": x.k[:, :1]}),
        ("attn_out", {"out": x.out[:, 1:]}),
        ("attn_out", {"out": x.out.astype(np.float16)}),
        ("seq_lens_encoder", {"encoder": []}),
        ("cu_seqlens_k", {"cu_k": x.cu_k[1:]}),
    ):
        with pytest.raises(ContractError) as caught:
            flash_mask(SimpleNamespace(**(vars(x) | change)))
        assert (caught.value.op, caught.value.argument) == ("flash_mask_attention", name)
    with pytest.raises(ShapeError, match="attn_mask_offsets: expected .2T. = .20."):
        flash_mask(x, int32(1, 2, 3))
    with pytest.raises(ContractError, match="attn_mask_offsets.* of request 0: expected 0 <="):
        flash_mask(x, tensor(np.full(20, 99, np.int32)))


def test_flash_attn_unpadded_takes_its_own_scale_and_refuses_dropout():
    x = attended(np.random.default_rng(3))
    qkv = [tensor(a) for a in (x.q, x.k, x.v)]
    sums = [int32(*x.cu_q), int32(*x.cu_k)]
    for scale in ({"scale": 0.3}, {"softmax_scale": 0.3}):
        out, lse = fastdeploy.flash_attn_unpadded(*qkv, *sums, 4, 9, causal=False, **scale)
        want, _ = oracle.attention(x.q[5:8], x.k[5:14], x.v[5:14], np.ones(9, bool), 0.3)
        assert np.abs(out[5:8].numpy() - want).max() < 1e-5
        assert lse is None
    for name, value in (("dropout", 0.1), ("return_softmax", True)):
        with pytest.raises(UnsupportedError, match=name):
            fastdeploy.flash_attn_unpadded(*qkv, *sums, 4, 9, **{name: value})
    with pytest.raises(ShapeError, match="flash_attn_unpadded: value"):
        fastdeploy.flash_attn_unpadded(*qkv[:2], qkv[2][1:], *sums, 4, 9)


# Counts of arguments


@pytest.mark.parametrize(
    ("op", "count", "served"),
    [
        ("pre_cache_len_concat", 3, "5 (develop of January 2026) or 4 (without seq_lens_encoder)"),
        ("flash_mask_attention", 12, "14 (develop of January 2026) or 11 (without max_seq_len, "),
        ("gqa_rope_write_cache", 30, "32 (develop of January 2026) or 31 (without use_neox_rotary"),
    ],
)
def test_another_number_of_arguments_says_which_are_served(op, count, served):
    with pytest.raises(ContractError) as caught:
        getattr(fastdeploy, op)(*[None] * count)
    assert (caught.value.op, caught.value.got) == (op, str(count))
    assert caught.value.expected.startswith(served)


# Arguments that fastkv does not serve


def step(fmt="cache_int8"):
    """A step of a fresh engine, with the arguments of append_attention and gqa_rope_write_cache."""
    engine = Engine(np.random.default_rng(4), "append", fmt)
    qkv = engine.tokens(MIXTURE[0])
    meta = engine.forward_meta(qkv, engine.meta(MIXTURE[0]))
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


def test_a_missing_or_surplus_tensor_is_named_for_each_format():
    for fmt in FORMATS:
        _, append, _ = step(fmt if fmt != "block_wise_fp8" else "cache_int8")
        append["cache_quant_type"] = fmt
        if fmt == "block_wise_fp8":
            append |= dict.fromkeys(name for name in append if name.endswith("_scale"))
        for name in ("key_cache", "value_cache"):
            with pytest.raises(MissingTensorError) as caught:
                fastdeploy.append_attention(
                    **(
                        append | {name: None, "k_quant_scale": TENSOR, "v_quant_scale": TENSOR}
                        if fmt == "block_wise_fp8"
                        else append | {name: None}
                    )
                )
            assert (caught.value.argument, caught.value.format) == (name, fmt)
        if fmt != "cache_int4_zp":
            given = append | (
                {"k_quant_scale": TENSOR, "v_quant_scale": TENSOR}
                if fmt == "block_wise_fp8"
                else {}
            )
            with pytest.raises(SurplusTensorError) as caught:
                fastdeploy.append_attention(**given, cache_v_zp=TENSOR)
            assert (caught.value.op, caught.value.argument) == ("append_attention", "cache_v_zp")
            assert caught.value.format == fmt
    _, append, _ = step("none")
    with pytest.raises(SurplusTensorError, match=r"k_dequant_scale \(format none\)"):
        fastdeploy.append_attention(**append, k_dequant_scale=TENSOR)


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


def test_gqa_returns_the_rotated_qkv_and_leaves_decode_pages_alone():
    engine, _, write = step()
    q, k, v, rotated = fastdeploy.gqa_rope_write_cache(**write)
    parts = rotated.reshape([14, -1, 16]).numpy()
    assert (parts[:12, :6] == q.numpy()[:12]).all()
    assert (parts[:12, 6:8] == k.numpy()).all()
    assert (parts[:12, 8:] == v.numpy()).all()
    assert (q.shape, k.shape) == ([14, 6, 16], [12, 2, 16])
    assert engine.caches


# fastkv's own backends under the engine's interface


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


# Installing


def test_install_fills_the_names_that_a_module_has():
    module = ModuleType("flash_mask_attn_backend")
    module.append_attention = module.merge_prefill_decode_output = None
    module.paddle = paddle
    assert fastdeploy.install(module) == ("append_attention", "merge_prefill_decode_output")
    assert module.append_attention is fastdeploy.append_attention
    assert not hasattr(module, "gqa_rope_write_cache")
    with pytest.raises(ContractError, match="install: module: .* got empty"):
        fastdeploy.install(ModuleType("empty"))


# The converter of int8 caches


def engine_bytes(codes, side):
    """Where each code lies in the engine's cache, element by element, plus 128."""
    pages, heads, page, dim = codes.shape
    stored = np.zeros((pages, heads, page * dim), np.uint8)
    for token in range(page):
        for channel in range(dim):
            row, column = (token, channel) if side == "k" else (channel, token)
            width = dim if side == "k" else page
            at = (row // 16 * 16 + row % 8 + column // 16 % 2 * 8) * width + column // 32 * 32
            at += row % 16 // 8 * 16 + column % 8 // 2 * 4 + column % 16 // 8 * 2 + column % 2
            stored[:, :, at] = codes[:, :, token, channel].astype(np.int16) + 128
    return stored.reshape(codes.shape)


@pytest.mark.parametrize("side", ["k", "v"])
def test_int8_caches_are_converted_both_ways(side):
    rng = np.random.default_rng(6)
    codes = rng.integers(-127, 128, (3, 2, 64, 128)).astype(np.int8)
    stored = engine_bytes(codes, side)
    assert len(np.unique(stored)) == 255
    found = fastdeploy.cache_from_fastdeploy(tensor(stored), side)
    assert (arrays.to_host(found) == codes).all()
    assert found.dtype == paddle.int8
    for given in (tensor(codes), tensor(codes.view(np.uint8))):
        back = fastdeploy.cache_to_fastdeploy(given, side)
        assert (arrays.to_host(back) == stored).all()
        assert back.dtype == paddle.uint8


@pytest.mark.parametrize("convert", ["cache_from_fastdeploy", "cache_to_fastdeploy"])
def test_other_layouts_are_not_converted(convert):
    call = getattr(fastdeploy, convert)
    cache = paddle.zeros([1, 1, 64, 128], "uint8")
    for fmt in FORMATS:
        if fmt != "cache_int8":
            with pytest.raises(UnsupportedError, match=rf"{convert}: .*format {fmt}"):
                call(cache, "k", fmt)
    for shape in ([1, 1, 32, 128], [1, 1, 64, 64], [1, 64, 128]):
        with pytest.raises(
            UnsupportedError, match=rf"{convert}: cache .*expected \[N, Hkv, 64, 128\]"
        ):
            call(paddle.zeros(shape, "uint8"), "v")
    with pytest.raises(UnknownNameError, match="side"):
        call(cache, "q")
    with pytest.raises(ContractError, match="expected (int8 or )?uint8, got float32"):
        call(cache.astype("float32"), "k")


def test_lengths_on_a_device_are_refused(mocker):
    _, append, _ = step()
    real = arrays.describe

    def on_gpu(array, op="", argument=""):
        info = real(array, op, argument)
        return info._replace(device="cuda:0") if argument == "set_max_lengths" else info

    mocker.patch("fastkv.arrays.describe", on_gpu)
    with pytest.raises(PlacementError, match="set_max_lengths .*a tensor on the CPU, got cuda:0"):
        fastdeploy.append_attention(**append)
