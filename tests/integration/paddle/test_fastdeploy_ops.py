# SPDX-License-Identifier: Apache-2.0
"""The ops of `fastkv.integrations.fastdeploy`, each on its own, on Paddle tensors on the CPU."""

from types import ModuleType, SimpleNamespace

import numpy as np
import paddle
import pytest

from fastkv import CacheSpec, arrays
from fastkv.errors import (
    ContractError,
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)
from fastkv.integrations import fastdeploy
from fastkv.integrations.fastdeploy import masks
from fastkv.integrations.fastdeploy.requests import rows_of
from helpers import oracle
from helpers.batches import floats, running_sum
from helpers.fastdeploy_engine import MIXTURE, Engine, tensor

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
    with pytest.raises(ShapeError, match=r"attn_mask_offsets: expected \[2T\] = \[20\]"):
        flash_mask(x, int32(1, 2, 3))
    with pytest.raises(ContractError, match=r"attn_mask_offsets.* of request 0: expected 0 <="):
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


# Installing


def test_install_fills_the_names_that_a_module_has():
    module = ModuleType("flash_mask_attn_backend")
    module.append_attention = module.merge_prefill_decode_output = None
    module.paddle = paddle
    module.FlashBackend = type("FlashBackend", (), {"flash_attn_func": None})
    assert fastdeploy.install(module) == ("append_attention", "merge_prefill_decode_output")
    assert module.append_attention is fastdeploy.append_attention
    assert not hasattr(module, "gqa_rope_write_cache")
    assert module.FlashBackend().flash_attn_func is fastdeploy.flash_attn_unpadded
    assert module.FlashBackend.flash_attn_kwargs == {}
    assert module.paddle is paddle
    with pytest.raises(ContractError, match=r"install: module: .* got empty"):
        fastdeploy.install(ModuleType("empty"))


def test_gqa_returns_the_rotated_qkv_too():
    engine = Engine(np.random.default_rng(4), "append", "none")
    qkv = engine.tokens(MIXTURE[0])
    meta = engine.forward_meta(qkv, engine.meta(MIXTURE[0]))
    lengths = (meta.seq_lens_encoder, meta.seq_lens_decoder, meta.seq_lens_this_time)
    sums, *_, total = fastdeploy.pre_cache_len_concat(*lengths, 0, 4)
    q, k, v, rotated = fastdeploy.gqa_rope_write_cache(
        *(tensor(qkv), *meta.caches[2:4], meta.cu_seqlens_q, sums, meta.rotary_embs),
        *(lengths[2], *lengths[:2], None, meta.block_tables, *[None] * 6),
        *(engine.engine_layer.q_norm_weight, engine.engine_layer.k_norm_weight),
        *(*[None] * 7, total.item(), 32, 1e-3, False, "none", False),
    )
    heads = rotated.reshape([14, -1, 16]).numpy()
    assert (heads[:12, :6] == q.numpy()[:12]).all()
    assert (heads[:12, 6:8] == k.numpy()).all()
    assert (heads[:12, 8:] == v.numpy()).all()
    assert not np.allclose(heads[:12], qkv.reshape(14, -1, 16)[:12], atol=0.1)


@pytest.mark.parametrize("requests", [0, 2])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_do_for_the_ops_of_a_prompt(requests, rows):
    lengths, sums = paddle.zeros([requests], "int32"), paddle.zeros([requests + 1], "int32")
    k_cache, v_cache = (paddle.full([4, 2, 4, 16], 7.0) for _ in "kv")
    q, k, v, rotated = fastdeploy.gqa_rope_write_cache(
        *(paddle.ones([rows, 160]), k_cache, v_cache, sums, sums, paddle.zeros([2, 1, 32, 1, 8])),
        *(lengths, lengths, lengths, None, paddle.zeros([requests, 3], "int32")),
        *(*[None] * 15, 0, 32, 1e-6, False, "none", False),
    )
    assert [x.shape[0] for x in (q, k, v, rotated)] == [rows, 0, 0, rows]
    out = paddle.full([rows, 96], 5.0)
    fastdeploy.flash_mask_attention(q, k, v, sums, sums, lengths, out, None, 6, 2, 16)
    fastdeploy.merge_prefill_decode_output(
        out, paddle.zeros([rows, 96]), lengths, lengths, lengths, sums, 6, 16, 1
    )
    assert (out == 5.0).all()
    assert (k_cache == 7.0).all()
    assert not q.any()


def test_a_window_narrows_intervals_and_widens_none():
    offsets = paddle.to_tensor(np.array([[0, 9], [6, 9], [3, 4], [5, 5]], np.int32))
    got = masks.intervals("op", "mask_offset", offsets, 4, window=4)
    assert got.tolist() == [[5, 9], [6, 9], [3, 4], [5, 5]]


def test_rows_before_the_first_request_and_behind_the_last_are_nobodys():
    served = paddle.to_tensor([True, False, True])
    sums = paddle.to_tensor(np.array([2, 3, 5, 6], np.int32))
    got = rows_of(served, sums, 8)
    assert got.tolist() == [False, False, True, False, False, True, False, False]


def test_an_idle_request_has_no_gathered_rows():
    spec = CacheSpec(1, 2, 16, 16, "none")
    batch = SimpleNamespace(
        caches=spec.allocate(4, library="paddle"),
        seq_lens_encoder=int32(3, 0, 2),
        seq_lens_decoder=int32(0, 7, 4),
        seq_lens_this_time=int32(3, 0, 2),
        cu_seqlens_q=int32(0, 3, 3, 5),
        block_tables=int32([0], [1], [2]),
    )
    meta = fastdeploy.meta_from(batch, spec)
    assert (meta.num_decode, meta.total_k, meta.cu_seqlens_k.tolist()) == (0, 9, [0, 3, 3, 9])
