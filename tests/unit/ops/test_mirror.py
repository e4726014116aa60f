# SPDX-License-Identifier: Apache-2.0
"""One name, several places; and the door that stays open for the next format."""

import ast
import importlib
import inspect
import re
from enum import Enum
from importlib import resources
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest

import fastkv
from fastkv import CacheSpec, ops, quant
from fastkv.backends import resolve
from fastkv.contracts import calls
from fastkv.errors import MissingTensorError, UnknownNameError
from fastkv.ops.reference import codecs
from fastkv.quant import QUANT_SPECS, QuantSpec, ScaleKind
from helpers import oracle
from helpers.batches import floats, make_batch, poison, running_sum
from helpers.calls import OPS
from helpers.compare import assert_close, assert_same_bits

ROOT = Path(__file__).resolve().parents[3]
# What the reference's folder holds besides the ops.
SHARED = {"__init__", "attend", "codecs", "paging", "values"}


def modules(package):
    return {
        entry.name.removesuffix(".py")
        for entry in resources.files(package).iterdir()
        if entry.name.endswith(".py")
    }


def test_an_op_has_the_same_name_in_every_place():
    assert modules("fastkv.ops") - {"__init__", "dispatch", "step"} == set(OPS)
    assert modules("fastkv.ops.reference") - SHARED == set(OPS)
    assert set(ops.__all__) - {"zeros_beside", "check_step"} == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_each_place_defines_the_op(op):
    public = getattr(ops, op)
    module = importlib.import_module(f"fastkv.ops.reference.{op}")
    assert public.__module__ == f"fastkv.ops.{op}"
    assert getattr(module, op).__module__ == module.__name__
    assert getattr(calls, op).__module__ == calls.__name__


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_a_launcher_a_kernel_and_a_gpu_test(op):
    places = {
        "launcher": resources.files("fastkv.ops.cuda") / f"{op}.py",
        "kernel": resources.files("fastkv.ops.cuda") / "kernels" / f"{op}.cu",
        "GPU test": ROOT / "tests" / "gpu" / f"test_{op}.py",
    }
    found = {what for what, path in places.items() if path.is_file()}
    assert found == set(places)


@pytest.mark.parametrize("op", OPS)
def test_a_launcher_takes_what_dispatch_hands_over(op):
    launcher = importlib.import_module(f"fastkv.ops.cuda.{op}")
    reference = importlib.import_module(f"fastkv.ops.reference.{op}")
    assert getattr(launcher, op).__module__ == launcher.__name__
    first, *given = inspect.signature(getattr(launcher, op)).parameters
    assert first == "checker"
    assert given == list(inspect.signature(getattr(reference, op)).parameters)
    assert all(what.kernel.startswith(op) for what in launcher.specializations())


@pytest.mark.parametrize("op", OPS)
def test_arguments_have_one_name_in_every_place(op):
    module = importlib.import_module(f"fastkv.ops.reference.{op}")
    public = inspect.signature(getattr(ops, op)).parameters
    reference = inspect.signature(getattr(module, op)).parameters
    contract = inspect.signature(getattr(calls, op)).parameters
    results = {"out", "lse", "q", "k", "v"}
    assert set(reference) - results <= set(public)
    assert set(contract) <= set(public)
    for name in set(public) & set(reference):
        assert public[name].kind == reference[name].kind


@pytest.mark.parametrize("op", OPS)
def test_the_docstring_names_every_argument(op):
    function = getattr(ops, op)
    text = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^    {name}: ", text, re.MULTILINE), name
    assert "Raises:" in text


def test_every_format_has_one_row_and_one_codec():
    assert [name.value for name in codecs.CODECS] == list(QUANT_SPECS)


def compared_formats(source):
    """Lines where a comparison or a `match` holds a format by its name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare | ast.MatchValue):
            for part in ast.walk(node):
                member = isinstance(part, ast.Attribute) and part.attr.lower() in QUANT_SPECS
                literal = isinstance(part, ast.Constant) and part.value in NAMES
                if member or literal:
                    yield node.lineno


# Not "none", which is a word of many meanings; as `QuantType.NONE` it counts.
NAMES = set(QUANT_SPECS) - {"none"}


def test_no_code_asks_for_a_format_by_name():
    assert list(compared_formats('if quant == "cache_int8":\n    pass')) == [1]
    assert list(compared_formats("x = row.name in (QuantType.NONE,)")) == [1]
    root = resources.files("fastkv")
    found = {
        path.name: lines
        for path in root.rglob("*.py")
        if (lines := list(compared_formats(path.read_text("utf-8"))))
    }
    assert found == {}


# --- a sixth format -----------------------------------------------------------------------------


class Extended(str, Enum):
    """The next row's name."""

    CACHE_INT8_TOKEN = "cache_int8_token"


ROW = QuantSpec(
    name=Extended.CACHE_INT8_TOKEN,
    storage="int8",
    elements_per_item=1,
    scale=ScaleKind.DYNAMIC,
    granularities=(),
    needs_zp=False,
    bound=127.0,
    code_min=-127.0,
    code_max=127.0,
    summary="int8, dynamic scale per token and KV head",
)


def encode(x, _, storage, scale_dtype):
    scale = (np.abs(x).max(axis=-1) / np.float32(127)).astype(scale_dtype)
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))[..., None]
    return np.rint(x / divisor).astype(storage), scale


def decode(stored, _, scale):
    return stored.astype(np.float32) * scale.astype(np.float32)[..., None]


@pytest.fixture
def sixth_format(monkeypatch):
    """One row and one codec, and nothing else."""
    name = ROW.name
    monkeypatch.setattr(quant, "QUANT_SPECS", MappingProxyType({**QUANT_SPECS, name.value: ROW}))
    codec = codecs.Codec(encode, decode)
    monkeypatch.setattr(codecs, "CODECS", MappingProxyType({**codecs.CODECS, name: codec}))
    return name.value


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_a_sixth_format_is_one_row_and_one_codec(sixth_format, scale_dtype):
    rng = np.random.default_rng(3)
    spec = CacheSpec(2, 2, 64, 16, ["none", sixth_format], "float32", scale_dtype)
    assert spec.num_tensors == 6
    assert spec.bytes_per_token() == 2 * 2 * 64 * 4 + 2 * 2 * (64 + np.dtype(scale_dtype).itemsize)
    batch = make_batch(rng, "none")
    caches = [poison(rng, t.shape, t.dtype) for t in spec.tensors(len(batch.cache.k))]
    layer = SimpleNamespace(layer_id=1, cache_quant_type_str=sixth_format)
    cache = resolve(caches, layer, spec)
    assert cache.k_scale is caches[4]
    fresh = batch.with_(
        cache=cache, cache_seqlens=np.zeros(3, np.int32), cached=(0, 0, 0), qkv=batch.qkv
    )
    q, k, v = ops.rope_write_kv(fresh.qkv, cache, **fresh.meta, rope=fresh.rope, return_kv=True)
    held = {"k": [], "v": []}
    for b, _, page, slot in fresh.owned("new"):
        for side in "kv":
            stored, scale = getattr(cache, side), getattr(cache, f"{side}_scale")
            codes, s = stored[page, :, slot].astype(float), oracle.values_of(scale[page, :, slot])
            held[side].append((b, codes * s[:, None]))
    for side, x in (("k", k), ("v", v)):
        read = np.stack([values for _, values in held[side]])
        step = np.abs(x).max(axis=-1, keepdims=True) / 127
        assert (np.abs(read - x) <= 0.7 * step).all()
    out, lse = ops.paged_attention(q, cache, **fresh.meta, return_lse=True)
    out_k, out_v = np.full((2, 14, 2, 64), np.nan, np.float32)
    ops.gather_kv(
        cache,
        cache_seqlens=np.array(fresh.new, np.int32),
        block_table=fresh.block_table,
        cu_seqlens_k=running_sum(fresh.new),
        out_k=out_k,
        out_v=out_v,
    )
    for b in range(3):
        own = {side: np.stack([x for request, x in held[side] if request == b]) for side in "kv"}
        assert_same_bits(out_k[fresh.rows(b)], own["k"].astype(np.float32))
        mask = oracle.visible_mask(fresh.new[b], fresh.new[b], True)
        want, want_lse = oracle.attention(q[fresh.rows(b)], own["k"], own["v"], mask, 1 / 8)
        assert_close(out[fresh.rows(b)], want)
        assert_close(lse[fresh.rows(b)], want_lse)
    ops.copy_pages(cache, fresh.block_table[0, :1], fresh.block_table[0, -1:])


def test_a_sixth_format_is_held_to_its_row(sixth_format):
    spec = CacheSpec(1, 2, 64, 16, sixth_format)
    caches = spec.allocate(3)
    layer = SimpleNamespace(layer_id=0, cache_quant_type_str=sixth_format)
    for i in range(4):
        with pytest.raises(MissingTensorError, match=sixth_format):
            resolve([None if j == i else t for j, t in enumerate(caches)], layer, spec)
    cache = resolve(caches, layer, spec)
    qkv = floats(np.random.default_rng(5), (1, 6 * 64))
    with pytest.raises(MissingTensorError, match=r"cu_seqlens_q \(format cache_int8_token\)"):
        ops.rope_write_kv(qkv, cache, cu_seqlens_q=None, cache_seqlens=None, block_table=None)


def test_without_its_row_the_sixth_format_is_unknown():
    with pytest.raises(UnknownNameError, match="cache_int8"):
        fastkv.CacheSpec(1, 2, 64, 16, "cache_int8_token")
