# SPDX-License-Identifier: Apache-2.0
"""Which op gets which tensors, for every backend, format and mixture."""

import inspect
from types import SimpleNamespace

import pytest

import fastkv.ops
from fastkv.backends import BACKEND_NAMES, get_backend
from fastkv.backends.features import BACKENDS
from fastkv.errors import ContractError, ShapeError
from helpers.recording import RecordingOps, everything_in
from helpers.sentinels import (
    FORMATS,
    SCALES,
    STATIC,
    TENSORS,
    Part,
    Sentinel,
    Sliceable,
    bare_layer,
    first_index,
    neighboured_spec,
    sentinel_meta,
)

REQUESTS = 5
GATHERING = ("flash", "flash_mask")
WRITE_DEFAULTS = {
    "q_norm_weight": None,
    "k_norm_weight": None,
    "norm_eps": 1e-6,
    "norm_after_rope": False,
}
ATTENTION_DEFAULTS = {
    "scale": None,
    "causal": True,
    "window": None,
    "soft_cap": None,
    "sinks": None,
}
QKV = Sliceable("qkv", 40, 320)


def every_option():
    """Attributes of a layer that uses everything, and what the ops get of them."""
    sinks, q_weight, k_weight = Sentinel("sinks"), Sentinel("q weight"), Sentinel("k weight")
    attributes = {
        "sliding_window": 17,
        "soft_cap": 30.0,
        "sinks": sinks,
        "softmax_scale": 0.07,
        "causal": False,
        "q_norm_weight": q_weight,
        "k_norm_weight": k_weight,
        "rms_norm_eps": 1e-5,
        "norm_after_rope": True,
    }
    write = {
        "q_norm_weight": q_weight,
        "k_norm_weight": k_weight,
        "norm_eps": 1e-5,
        "norm_after_rope": True,
    }
    attention = {
        "scale": 0.07,
        "causal": False,
        "window": 17,
        "soft_cap": 30.0,
        "sinks": sinks,
    }
    return attributes, write, attention


def run(backend, fmt, num_decode, attributes=None, **changes):
    spec = neighboured_spec(fmt)
    ops = RecordingOps()
    meta = sentinel_meta(spec, requests=REQUESTS, num_decode=num_decode, **changes)
    layer = bare_layer(fmt, 1, **(attributes or {}))
    result = get_backend(spec, name=backend, ops=ops).forward_mixed(QKV, layer, meta)
    return ops, meta, layer, result


def assert_cache(view, meta, layer, fmt):
    first = first_index(["block_wise_fp8"], 1)
    for i, name in enumerate(TENSORS[fmt]):
        assert getattr(view, name) is meta.caches[first + i]
    if len(TENSORS[fmt]) == 2:
        assert (view.k_scale, view.v_scale) == (None, None)
    assert (view.static is None) == (not STATIC[fmt])
    for attribute, field in STATIC[fmt].items():
        assert getattr(view.static, field) is getattr(layer, attribute)


def whole(meta):
    return {
        "cu_seqlens_q": meta.cu_seqlens_q,
        "cache_seqlens": meta.cache_seqlens,
        "block_table": meta.block_table,
    }


def part(meta, start, stop):
    return {
        "cu_seqlens_q": Part(meta.cu_seqlens_q, start, stop + 1),
        "cache_seqlens": Part(meta.cache_seqlens, start, stop),
        "block_table": Part(meta.block_table, start, stop),
    }


options = pytest.mark.parametrize("with_options", [False, True], ids=["defaults", "every-option"])
every_format = pytest.mark.parametrize("fmt", FORMATS)


def expectations(with_options):
    return every_option() if with_options else ({}, WRITE_DEFAULTS, ATTENTION_DEFAULTS)


@options
@every_format
@pytest.mark.parametrize(
    ("backend", "num_decode"),
    [("append", 0), ("append", 2), ("append", 5), ("flash", 5), ("flash_mask", 5)],
)
def test_write_then_attend_over_the_pages(backend, num_decode, fmt, with_options):
    attributes, write, attention = expectations(with_options)
    masks = Sentinel("mask_offsets")
    ops, meta, layer, result = run(backend, fmt, num_decode, attributes, mask_offsets=masks)
    assert ops.names() == ["rope_write_kv", "paged_attention"]
    written, attended = ops.calls
    assert written.args[0] is QKV
    assert_cache(written.args[1], meta, layer, fmt)
    assert written.kwargs == {**whole(meta), "rope": meta.rope, **write}
    assert attended.args == (written.result, written.args[1])
    assert attended.kwargs == {**whole(meta), **attention, "mask_offsets": masks}
    assert result is attended.result


@options
@every_format
@pytest.mark.parametrize("backend", GATHERING)
def test_prefill_attends_over_gathered_tokens(backend, fmt, with_options):
    attributes, write, attention = expectations(with_options)
    masks = Sentinel("mask_offsets") if backend == "flash_mask" else None
    ops, meta, layer, result = run(backend, fmt, 0, attributes, mask_offsets=masks)
    assert ops.names() == [
        "zeros_beside",
        "zeros_beside",
        "rope_write_kv",
        "gather_kv",
        "masked_attention",
    ]
    zeros_k, zeros_v, written, gathered, attended = ops.calls
    for zeros in (zeros_k, zeros_v):
        assert (zeros.args, zeros.kwargs) == ((QKV, (31, 2, 16)), {})
    outs = {"out_k": zeros_k.result, "out_v": zeros_v.result}
    assert written.args[0] is QKV
    assert_cache(written.args[1], meta, layer, fmt)
    assert written.kwargs == {
        **whole(meta),
        "rope": meta.rope,
        **write,
        **outs,
        "cu_seqlens_k": meta.cu_seqlens_k,
    }
    prefill = part(meta, 0, 5)
    cu_seqlens_q, cu_seqlens_k = prefill.pop("cu_seqlens_q"), Part(meta.cu_seqlens_k, 0, 6)
    assert gathered.args == (written.args[1],)
    assert gathered.kwargs == {**prefill, "cu_seqlens_k": cu_seqlens_k, **outs}
    assert attended.args == (written.result, zeros_k.result, zeros_v.result)
    assert attended.kwargs == {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        **attention,
        "mask_offsets": masks,
        "out": None,
    }
    assert result is attended.result


@options
@every_format
@pytest.mark.parametrize("num_decode", [1, 2, 4])
@pytest.mark.parametrize("backend", GATHERING)
def test_mixture_is_cut_at_num_decode_and_shares_one_out(backend, num_decode, fmt, with_options):
    attributes, write, attention = expectations(with_options)
    masks = Sentinel("mask_offsets") if backend == "flash_mask" else None
    ops, meta, layer, result = run(backend, fmt, num_decode, attributes, mask_offsets=masks)
    # The paged op zeroes what lies behind its requests, so it comes before the prefill rows.
    assert ops.names() == [
        "zeros_beside",
        "zeros_beside",
        "rope_write_kv",
        "paged_attention",
        "gather_kv",
        "masked_attention",
    ]
    zeros_k, zeros_v, written, paged, gathered, attended = ops.calls
    assert zeros_k.result is not zeros_v.result
    outs = {"out_k": zeros_k.result, "out_v": zeros_v.result}
    assert_cache(written.args[1], meta, layer, fmt)
    assert written.kwargs == {
        **whole(meta),
        "rope": meta.rope,
        **write,
        **outs,
        "cu_seqlens_k": meta.cu_seqlens_k,
    }
    view = written.args[1]
    assert paged.args == (written.result, view)
    assert paged.kwargs == {**part(meta, 0, num_decode), **attention, "mask_offsets": masks}
    prefill = part(meta, num_decode, REQUESTS)
    cu_seqlens_q = prefill.pop("cu_seqlens_q")
    cu_seqlens_k = Part(meta.cu_seqlens_k, num_decode, REQUESTS + 1)
    assert gathered.args == (view,)
    assert gathered.kwargs == {**prefill, "cu_seqlens_k": cu_seqlens_k, **outs}
    assert attended.args == (written.result, zeros_k.result, zeros_v.result)
    assert attended.kwargs == {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        **attention,
        "mask_offsets": masks,
        "out": paged.result,
    }
    assert result is attended.result
    assert result is paged.result


@every_format
@pytest.mark.parametrize("num_decode", [0, 2, 5])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_every_call_fits_the_signature_of_the_real_op(backend, num_decode, fmt):
    ops, *_ = run(backend, fmt, num_decode, every_option()[0])
    for call in ops.calls:
        signature = inspect.signature(getattr(fastkv.ops, call.op))
        bound = signature.bind(*call.args, **call.kwargs)
        assert bound.arguments


@pytest.mark.parametrize("num_decode", [0, 2, 5])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_the_table_names_the_ops_that_run(backend, num_decode):
    ops, *_ = run(backend, "none", num_decode)
    row = BACKENDS[backend]
    want = {*(row.decode if num_decode else ()), *(row.prefill if num_decode < REQUESTS else ())}
    assert set(ops.names()) - {"zeros_beside"} == want
    for names in (row.decode, row.prefill):
        order = [name for name in ops.names() if name in names]
        assert order == [name for name in names if name in order]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_a_batch_without_requests(backend):
    spec, ops = neighboured_spec("cache_fp8"), RecordingOps()
    meta = sentinel_meta(spec, requests=0, num_decode=0, cu_seqlens_k=None, total_k=None)
    result = get_backend(spec, name=backend, ops=ops).forward_mixed(
        QKV, bare_layer("cache_fp8", 1), meta
    )
    assert ops.names() == ["rope_write_kv", "paged_attention"]
    assert result is ops.calls[1].result


@pytest.mark.parametrize("num_decode", [0, 2, 5])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_static_scales_of_a_dynamic_layer_reach_no_op(backend, num_decode):
    surplus = {name: Sentinel(f"surplus {name}") for name in SCALES}
    ops, meta, layer, _ = run(backend, "block_wise_fp8", num_decode, surplus)
    handed = everything_in([(call.args, call.kwargs) for call in ops.calls])
    # The search does find what is handed on.
    for tensor in (meta.caches[4], meta.caches[6], meta.rope.cos, meta.cu_seqlens_q):
        assert any(found is tensor for found in handed)
    for tensor in surplus.values():
        assert not any(found is tensor for found in handed)
    assert not any(found is layer for found in handed)


@every_format
@pytest.mark.parametrize("num_decode", [0, 2, 5])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_no_op_gets_a_tensor_of_another_layer(backend, num_decode, fmt):
    ops, meta, *_ = run(backend, fmt, num_decode)
    handed = everything_in([(call.args, call.kwargs) for call in ops.calls])
    given = [i for i, tensor in enumerate(meta.caches) if any(x is tensor for x in handed)]
    assert given == list(range(4, 4 + len(TENSORS[fmt])))


# --- the options of a layer -------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(("name", "value"), [("sliding_window", 0), ("soft_cap", 0.0)])
def test_zero_means_none(backend, name, value):
    ops, *_ = run(backend, "none", 5, {name: value})
    assert ops.only("paged_attention").kwargs["window"] is None
    assert ops.only("paged_attention").kwargs["soft_cap"] is None


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_none_means_absent(backend):
    ops, *_ = run(backend, "none", 5, dict.fromkeys(every_option()[0]))
    written, attended = ops.calls
    assert {name: written.kwargs[name] for name in WRITE_DEFAULTS} == WRITE_DEFAULTS
    assert {name: attended.kwargs[name] for name in ATTENTION_DEFAULTS} == ATTENTION_DEFAULTS


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", -1),
        ("sliding_window", 1.5),
        ("sliding_window", True),
        ("sliding_window", float("nan")),
        ("soft_cap", -30.0),
        ("soft_cap", float("inf")),
        ("soft_cap", float("nan")),
        ("softmax_scale", float("nan")),
        ("softmax_scale", float("-inf")),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", float("nan")),
    ],
)
def test_number_that_no_op_can_use(backend, name, value):
    ops = RecordingOps()
    spec = neighboured_spec("cache_int8")
    with pytest.raises(ContractError) as caught:
        get_backend(spec, name=backend, ops=ops).forward_mixed(
            QKV, bare_layer("cache_int8", 1, **{name: value}), sentinel_meta(spec)
        )
    assert_refused(caught.value, ops, backend, f"layer.{name}", "cache_int8")
    assert caught.value.expected.startswith("None or ")


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("name", ["sliding_window", "soft_cap", "softmax_scale", "rms_norm_eps"])
def test_a_tensor_is_no_number(backend, name):
    # A scalar on a device is not read back to be compared.
    ops = RecordingOps()
    spec = neighboured_spec("none")
    layer = bare_layer("none", 1, **{name: Sentinel(name)})
    with pytest.raises(ContractError) as caught:
        get_backend(spec, name=backend, ops=ops).forward_mixed(QKV, layer, sentinel_meta(spec))
    assert_refused(caught.value, ops, backend, f"layer.{name}", "none")
    assert caught.value.got == "Sentinel"


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_decode", -1, "a host integer, 0 to 5"),
        ("num_decode", 6, "a host integer, 0 to 5"),
        ("num_decode", True, "a host integer, 0 to 5"),
        ("num_decode", None, "a host integer, 0 to 5"),
        ("num_decode", 2.0, "a host integer, 0 to 5"),
        ("num_decode", Sentinel("num_decode"), "a host integer, 0 to 5"),
        ("total_k", -1, "a host integer of at least 0"),
        ("total_k", Sentinel("total_k"), "a host integer of at least 0"),
    ],
)
def test_host_integers_of_the_batch(backend, name, value, expected):
    ops = RecordingOps()
    spec = neighboured_spec("block_wise_fp8")
    meta = sentinel_meta(spec, **{name: value})
    with pytest.raises(ContractError) as caught:
        get_backend(spec, name=backend, ops=ops).forward_mixed(
            QKV, bare_layer("block_wise_fp8", 1), meta
        )
    assert_refused(caught.value, ops, backend, f"meta.{name}", "block_wise_fp8")
    assert caught.value.expected == expected


@pytest.mark.parametrize("lengths", [[3, 1], SimpleNamespace(shape=()), Sliceable("x", 2, 2)])
def test_cache_seqlens_without_a_length(lengths):
    ops = RecordingOps()
    spec = neighboured_spec("none")
    with pytest.raises(ShapeError) as caught:
        get_backend(spec, name="append", ops=ops).forward_mixed(
            QKV, bare_layer("none", 1), sentinel_meta(spec, cache_seqlens=lengths)
        )
    assert_refused(caught.value, ops, "append", "meta.cache_seqlens", "none")


def assert_refused(error, ops, backend, argument, fmt):
    assert ops.calls == []
    assert error.op == f"{backend}.forward_mixed"
    assert error.argument == argument
    assert error.format == fmt
    for part_ in (error.op, argument, f"format {fmt}", error.expected, error.got):
        assert part_ in str(error)
