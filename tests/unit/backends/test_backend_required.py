# SPDX-License-Identifier: Apache-2.0
"""A required tensor that is None raises, and no op, or nothing behind an op, was called."""

from dataclasses import replace

import numpy as np
import pytest

import fastkv.ops
from fastkv import LayerCache, Rope, StaticScales
from fastkv.backends import BACKEND_NAMES, get_backend, resolve
from fastkv.errors import MissingTensorError, SurplusTensorError
from fastkv.ops import dispatch
from helpers.mixed import Engine, Step
from helpers.recording import RecordingOps
from helpers.sentinels import (
    FORMATS,
    STATIC,
    TENSORS,
    Sentinel,
    Sliceable,
    bare_layer,
    flat_list,
    neighboured_spec,
    sentinel_meta,
)

QKV = Sliceable("qkv", 40, 320)
CACHE_TENSORS = [(fmt, name) for fmt in FORMATS for name in TENSORS[fmt]]
STATIC_TENSORS = [(fmt, name) for fmt in FORMATS for name in STATIC[fmt]]
every_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
every_format = pytest.mark.parametrize("fmt", FORMATS)


def refuse(backend, layer, meta, qkv=QKV):
    """The error of a call that must not reach an op."""
    ops = RecordingOps()
    spec = neighboured_spec("none") if meta.spec is None else meta.spec
    with pytest.raises(MissingTensorError) as caught:
        get_backend(spec, name=backend, ops=ops).forward_mixed(qkv, layer, meta)
    assert ops.calls == []
    return caught.value


def assert_names(error, op, argument, fmt):
    assert (error.op, error.argument, error.format, error.got) == (op, argument, fmt, "None")
    for part in (op, argument, error.expected, "None"):
        assert part in str(error)
    assert fmt is None or f"format {fmt}" in str(error)


# --- through the backends ---------------------------------------------------------------------


@every_backend
@every_format
@pytest.mark.parametrize("num_decode", [0, 2, 5])
def test_a_complete_call_reaches_the_ops(backend, fmt, num_decode):
    ops = RecordingOps()
    spec = neighboured_spec(fmt)
    meta = sentinel_meta(spec, num_decode=num_decode)
    get_backend(spec, name=backend, ops=ops).forward_mixed(QKV, bare_layer(fmt, 1), meta)
    assert ops.names()[-1] in {"paged_attention", "masked_attention"}


@every_backend
@pytest.mark.parametrize("num_decode", [0, 2, 5])
@pytest.mark.parametrize(("fmt", "name"), CACHE_TENSORS)
def test_cache_tensor(backend, num_decode, fmt, name):
    spec = neighboured_spec(fmt)
    caches = flat_list(spec)
    at = 4 + TENSORS[fmt].index(name)
    caches[at] = None
    meta = sentinel_meta(spec, caches=caches, num_decode=num_decode)
    error = refuse(backend, bare_layer(fmt, 1), meta)
    assert_names(error, "resolve", f"caches[{at}], layer 1's {name}", fmt)


@every_backend
@every_format
def test_a_hole_in_another_layer_is_not_this_layers_business(backend, fmt):
    spec = neighboured_spec(fmt)
    caches = flat_list(spec)
    caches[0] = caches[-1] = None
    ops = RecordingOps()
    get_backend(spec, name=backend, ops=ops).forward_mixed(
        QKV, bare_layer(fmt, 1), sentinel_meta(spec, caches=caches)
    )
    assert ops.only("rope_write_kv").args[1].k is caches[4]


@every_backend
@pytest.mark.parametrize("num_decode", [0, 2, 5])
@pytest.mark.parametrize(("fmt", "name"), STATIC_TENSORS)
def test_static_tensor(backend, num_decode, fmt, name):
    meta = sentinel_meta(neighboured_spec(fmt), num_decode=num_decode)
    error = refuse(backend, bare_layer(fmt, 1, **{name: None}), meta)
    assert_names(error, "resolve", f"layer.{name}", fmt)


@every_backend
@every_format
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cache_seqlens", "block_table"])
def test_batch_tensor(backend, fmt, name):
    meta = sentinel_meta(neighboured_spec(fmt), **{name: None})
    error = refuse(backend, bare_layer(fmt, 1), meta)
    assert_names(error, f"{backend}.forward_mixed", f"meta.{name}", fmt)


@every_backend
@every_format
def test_qkv(backend, fmt):
    meta = sentinel_meta(neighboured_spec(fmt))
    error = refuse(backend, bare_layer(fmt, 1), meta, qkv=None)
    assert_names(error, f"{backend}.forward_mixed", "qkv", fmt)


@every_backend
@every_format
@pytest.mark.parametrize("name", ["cos", "sin"])
def test_rope_table(backend, fmt, name):
    tables = {"cos": Sentinel("cos"), "sin": Sentinel("sin"), name: None}
    meta = sentinel_meta(neighboured_spec(fmt), rope=Rope(**tables))
    error = refuse(backend, bare_layer(fmt, 1), meta)
    assert_names(error, f"{backend}.forward_mixed", f"meta.rope.{name}", fmt)


@every_backend
@pytest.mark.parametrize("name", ["caches", "spec"])
def test_what_even_the_format_hangs_on(backend, name):
    meta = replace(sentinel_meta(neighboured_spec("none")), **{name: None})
    error = refuse(backend, bare_layer("none", 1), meta)
    assert_names(error, f"{backend}.forward_mixed", f"meta.{name}", None)


@every_format
@pytest.mark.parametrize("num_decode", [0, 4])
@pytest.mark.parametrize("name", ["cu_seqlens_k", "total_k"])
@pytest.mark.parametrize("backend", ["flash", "flash_mask"])
def test_gathering_needs_the_contiguous_lengths(backend, name, num_decode, fmt):
    meta = sentinel_meta(neighboured_spec(fmt), num_decode=num_decode, **{name: None})
    error = refuse(backend, bare_layer(fmt, 1), meta)
    assert_names(error, f"{backend}.forward_mixed", f"meta.{name}", fmt)


@every_format
@pytest.mark.parametrize(("backend", "num_decode"), [("append", 0), ("append", 2), ("flash", 5)])
def test_who_gathers_nothing_needs_no_contiguous_lengths(backend, num_decode, fmt):
    spec, ops = neighboured_spec(fmt), RecordingOps()
    meta = sentinel_meta(spec, num_decode=num_decode, cu_seqlens_k=None, total_k=None)
    get_backend(spec, name=backend, ops=ops).forward_mixed(QKV, bare_layer(fmt, 1), meta)
    assert ops.names() == ["rope_write_kv", "paged_attention"]


# --- zero points are asked of one format alone -------------------------------------------------

WITHOUT_ZERO_POINTS = [fmt for fmt in FORMATS if "cache_k_zp" not in STATIC[fmt]]


def test_four_formats_have_no_zero_points():
    assert WITHOUT_ZERO_POINTS == ["none", "cache_int8", "cache_fp8", "block_wise_fp8"]


@every_backend
@pytest.mark.parametrize("fmt", WITHOUT_ZERO_POINTS)
@pytest.mark.parametrize("num_decode", [0, 2])
def test_prefill_over_a_prefix_with_zero_points_none(backend, fmt, num_decode):
    spec, ops = neighboured_spec(fmt), RecordingOps()
    layer = bare_layer(fmt, 1, cache_k_zp=None, cache_v_zp=None)
    meta = sentinel_meta(spec, num_decode=num_decode)
    get_backend(spec, name=backend, ops=ops).forward_mixed(QKV, layer, meta)
    view = ops.only("rope_write_kv").args[1]
    if view.static is not None:
        assert (view.static.k_zp, view.static.v_zp) == (None, None)
    reader = "paged_attention" if backend == "append" else "gather_kv"
    assert view in ops.only(reader).args


@every_backend
@pytest.mark.parametrize("fmt", WITHOUT_ZERO_POINTS)
def test_prefill_over_a_prefix_with_zero_points_none_on_the_reference(backend, fmt):
    engine = Engine(np.random.default_rng(41), backend, fmt)
    assert (engine.layer.cache_k_zp, engine.layer.cache_v_zp) == (None, None)
    seen = engine.run([Step(prefill=((0, 6), (1, 3))), Step(prefill=((1, 4), (0, 5)))])
    assert seen.rows == 18


# --- through the ops ---------------------------------------------------------------------------

BATCH = ("cu_seqlens_q", "cache_seqlens", "block_table")
#: Tensors that each op requires beside the cache, by position and by name.
OPS = {
    "rope_write_kv": (("qkv", "cache"), BATCH),
    "gather_kv": (("cache",), ("cache_seqlens", "block_table", "cu_seqlens_k", "out_k", "out_v")),
    "paged_attention": (("q", "cache"), BATCH),
    "copy_pages": (("cache", "src", "dst"), ()),
    "masked_attention": (("q", "k", "v"), ("cu_seqlens_q", "cu_seqlens_k")),
    "merge_states": (("out_a", "lse_a", "out_b", "lse_b"), ()),
}
CACHE_OPS = [op for op, (positional, _) in OPS.items() if "cache" in positional]


def test_the_table_has_every_op():
    assert set(OPS) == set(fastkv.ops.__all__) - {"zeros_beside", "check_step"}


@pytest.fixture
def launched(monkeypatch):
    """What went behind the ops' checks."""
    calls = []
    monkeypatch.setattr(
        dispatch, "runner", lambda checker: lambda *_, **__: calls.append(checker.op)
    )
    return calls


def view_of(fmt):
    spec = neighboured_spec(fmt)
    return resolve(flat_list(spec), bare_layer(fmt, 1), spec)


def call_op(op, cache, **changes):
    positional, named = OPS[op]
    given = {name: Sentinel(name) for name in (*positional, *named)} | {"cache": cache} | changes
    args = [given[name] for name in positional]
    return getattr(fastkv.ops, op)(*args, **{name: given[name] for name in named})


@pytest.mark.parametrize("op", CACHE_OPS)
@pytest.mark.parametrize(("fmt", "name"), CACHE_TENSORS)
def test_op_refuses_a_cache_without_a_tensor(op, fmt, name, launched):
    with pytest.raises(MissingTensorError) as caught:
        call_op(op, replace(view_of(fmt), **{name: None}))
    assert_names(caught.value, op, f"cache.{name}", fmt)
    assert launched == []


@pytest.mark.parametrize("op", CACHE_OPS)
@pytest.mark.parametrize(("fmt", "name"), STATIC_TENSORS)
def test_op_refuses_a_bundle_without_a_field(op, fmt, name, launched):
    view, field = view_of(fmt), STATIC[fmt][name]
    object.__setattr__(view.static, field, None)  # its constructor would refuse
    with pytest.raises(MissingTensorError) as caught:
        call_op(op, view)
    assert_names(caught.value, op, f"cache.static.{field}", fmt)
    assert launched == []


@pytest.mark.parametrize("op", CACHE_OPS)
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if STATIC[fmt]])
def test_op_refuses_a_cache_without_a_bundle(op, fmt, launched):
    with pytest.raises(MissingTensorError) as caught:
        call_op(op, replace(view_of(fmt), static=None))
    assert_names(caught.value, op, "cache.static", fmt)
    assert launched == []


@pytest.mark.parametrize("op", CACHE_OPS)
def test_op_refuses_no_cache_at_all(op, launched):
    with pytest.raises(MissingTensorError) as caught:
        call_op(op, None)
    assert_names(caught.value, op, "cache", None)
    assert launched == []


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, (a, b) in OPS.items() for name in (*a, *b) if name != "cache"],
)
@every_format
def test_op_refuses_a_missing_argument(op, name, fmt, launched):
    with pytest.raises(MissingTensorError) as caught:
        call_op(op, view_of(fmt), **{name: None})
    assert_names(caught.value, op, name, fmt if op in CACHE_OPS else None)
    assert launched == []


SURPLUS = StaticScales(*(Sentinel(name) for name in ("kq", "kd", "vq", "vd", "kz", "vz")))


@pytest.mark.parametrize("op", CACHE_OPS)
@pytest.mark.parametrize(
    ("fmt", "name", "argument"),
    [
        *((f, n, n) for f in FORMATS if len(TENSORS[f]) == 2 for n in ("k_scale", "v_scale")),
        *((f, "static", "static") for f in FORMATS if not STATIC[f]),
        *((f, "static", "static.k_zp") for f in ("cache_int8", "cache_fp8")),
    ],
)
def test_op_refuses_surplus(op, fmt, name, argument, launched):
    surplus = SURPLUS if name == "static" else Sentinel(name)
    with pytest.raises(SurplusTensorError) as caught:
        call_op(op, replace(view_of(fmt), **{name: surplus}))
    error = caught.value
    assert (error.op, error.argument, error.format) == (op, f"cache.{argument}", fmt)
    assert error.expected.startswith("None: ")
    assert launched == []


def test_a_view_is_a_layer_cache():
    assert isinstance(view_of("none"), LayerCache)
