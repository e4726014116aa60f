# SPDX-License-Identifier: Apache-2.0
"""`RecordingOps`: writes down what came, and answers as the ops do."""

from types import SimpleNamespace

import pytest

import fastkv.ops
from fastkv import CacheSpec
from fastkv.backends import resolve
from fastkv.testing import (
    RecordingOps,
    SentinelTensor,
    sentinel_caches,
    sentinel_layer,
    sentinel_qkv,
)

SPEC = CacheSpec(2, 2, 64, 8, "cache_int8")
CACHE = resolve(sentinel_caches(SPEC), sentinel_layer(SPEC, 1), SPEC)
QKV = sentinel_qkv(SPEC, "mixed", group=3)
BATCH = {"cu_seqlens_q": object(), "cache_seqlens": object(), "block_table": object()}


def test_every_op_is_recorded():
    # A check computes nothing: backends call it where the ops have it, and a record needs none.
    assert set(fastkv.ops.__all__) - {"check_step"} == {
        name for name in dir(RecordingOps) if name[0] != "_" and hasattr(fastkv.ops, name)
    }


def test_calls_in_order_with_arguments_by_name():
    ops = RecordingOps()
    q = ops.rope_write_kv(QKV, CACHE, **BATCH)
    out = ops.paged_attention(q, cache=CACHE, **BATCH)
    assert ops.names() == ["rope_write_kv", "paged_attention"]
    written, attended = ops.calls
    assert (written.args, written.kwargs, written.result) == ((QKV, CACHE), BATCH, q)
    assert written.arguments == {"qkv": QKV, "cache": CACHE, **BATCH}
    assert attended.args == (q,)
    assert attended.arguments == {"q": q, "cache": CACHE, **BATCH}
    assert attended.result is out


def test_results_have_names_shapes_and_dtypes():
    ops = RecordingOps()
    q, k, v = ops.rope_write_kv(QKV, CACHE, **BATCH, return_kv=True)
    assert [(x.name, x.shape) for x in (q, k, v)] == [
        ("call 0, rope_write_kv: q", (13, 6, 64)),
        ("call 0, rope_write_kv: k", (13, 2, 64)),
        ("call 0, rope_write_kv: v", (13, 2, 64)),
    ]
    out, lse = ops.paged_attention(q, CACHE, **BATCH, return_lse=True)
    assert [(x.name, x.shape, x.dtype) for x in (out, lse)] == [
        ("call 1, paged_attention: out", (13, 6, 64), "bfloat16"),
        ("call 1, paged_attention: lse", (13, 6), "float32"),
    ]
    merged = ops.merge_states(out, lse, out, lse)
    assert [(x.name, x.shape, x.dtype) for x in merged] == [
        ("call 2, merge_states: out", (13, 6, 64), "bfloat16"),
        ("call 2, merge_states: lse", (13, 6), "float32"),
    ]
    zeros = ops.zeros_beside(QKV, [5, 2, 64])
    assert (zeros.shape, zeros.dtype) == ((5, 2, 64), "bfloat16")


def test_results_are_new_each_time():
    ops = RecordingOps()
    assert ops.rope_write_kv(QKV, CACHE, **BATCH) is not ops.rope_write_kv(QKV, CACHE, **BATCH)


def test_an_out_that_is_given_is_returned():
    ops, out = RecordingOps(), object()
    lengths = {"cu_seqlens_q": object(), "cu_seqlens_k": object()}
    assert ops.masked_attention(object(), object(), object(), **lengths, out=out) is out
    assert ops.paged_attention(object(), CACHE, **BATCH, out=out, return_lse=True)[0] is out


def test_ops_without_a_result():
    ops = RecordingOps()
    batch = {name: BATCH[name] for name in ("cache_seqlens", "block_table")}
    more = {"cu_seqlens_k": object(), "out_k": object(), "out_v": object()}
    assert ops.gather_kv(CACHE, **batch, **more) is None
    assert ops.copy_pages(CACHE, object(), object()) is None
    assert ops.names() == ["gather_kv", "copy_pages"]


@pytest.mark.parametrize("qkv", [object(), SentinelTensor("qkv"), SimpleNamespace(shape=(3,))])
def test_tensors_of_unknown_shape_are_taken(qkv):
    assert RecordingOps().rope_write_kv(qkv, CACHE, **BATCH).shape is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda ops: ops.rope_write_kv(QKV, CACHE, **BATCH, ropes=None),
        lambda ops: ops.rope_write_kv(QKV, CACHE, cu_seqlens_q=object()),
        lambda ops: ops.gather_kv(CACHE, QKV, CACHE),
    ],
)
def test_a_call_that_the_real_op_does_not_take(wrong):
    ops = RecordingOps()
    with pytest.raises(TypeError, match="argument"):
        wrong(ops)
    assert ops.calls == []


def test_the_one_call():
    ops = RecordingOps()
    with pytest.raises(AssertionError, match=r"one call of zeros_beside, got 0: \[\]"):
        ops.only("zeros_beside")
    ops.zeros_beside(QKV, (1,))
    assert ops.only("zeros_beside") is ops.calls[0]
    ops.zeros_beside(QKV, (1,))
    with pytest.raises(AssertionError, match="got 2"):
        ops.only("zeros_beside")


def test_through_runs_the_ops_given():
    answers = {name: object() for name in fastkv.ops.__all__}
    taken = []

    def answer(name):
        return lambda *args, **kwargs: taken.append((name, args, kwargs)) or answers[name]

    ops = RecordingOps(SimpleNamespace(**{name: answer(name) for name in answers}))
    assert ops.zeros_beside(QKV, (4,)) is answers["zeros_beside"]
    assert ops.rope_write_kv(QKV, CACHE, **BATCH) is answers["rope_write_kv"]
    assert taken == [("zeros_beside", (QKV, (4,)), {}), ("rope_write_kv", (QKV, CACHE), BATCH)]
    assert ops.calls[1].result is answers["rope_write_kv"]
