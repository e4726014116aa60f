# SPDX-License-Identifier: Apache-2.0
"""fastkv's own files of static scales: bit for bit, whole or not at all, refused by name."""

import json
import resource
import warnings
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from fastkv import CacheSpec
from fastkv.errors import (
    ContractError,
    DtypeError,
    FastKVError,
    LayerIndexError,
    MissingTensorError,
    ScaleError,
    ScaleWarning,
    ShapeError,
    SurplusTensorError,
)
from fastkv.scales import (
    FIELDS,
    load_checkpoint,
    load_scales,
    save_checkpoint,
    save_fastdeploy_json,
    save_scales,
)
from helpers.batches import static_scales
from helpers.compare import assert_same_bits

HEADS, DIM = 3, 8
FORMATS = ("cache_int8", "block_wise_fp8", "cache_int4_zp", "cache_fp8", "none", "cache_int8")
GRANULARITIES = ("channel", None, "flat", "head", None, "head")
PREFIX = "model.layers.{layer}.self_attn"


def spec(quant=FORMATS):
    return CacheSpec(len(quant), HEADS, DIM, 4, quant)


def bundles(dtype="float32", seed=0):
    """One bundle for each static layer, the last layer first."""
    rng = np.random.default_rng(seed)
    found = {
        i: static_scales(rng, fmt, HEADS, DIM, granularity, dtype)
        for i, (fmt, granularity) in enumerate(zip(FORMATS, GRANULARITIES, strict=True))
    }
    return {i: found[i] for i in sorted(found, reverse=True) if found[i] is not None}


def assert_same_bundles(got, want):
    assert list(got) == sorted(want)
    for layer, bundle in want.items():
        for name in FIELDS:
            array, other = getattr(bundle, name), getattr(got[layer], name)
            if array is None:
                assert other is None
                continue
            assert (other.dtype, other.shape) == (array.dtype, array.shape)
            assert_same_bits(other, array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("checked", [True, False])
def test_round_trip_keeps_every_bit(tmp_path, dtype, checked):
    path, want = tmp_path / "scales.safetensors", bundles(dtype)
    save_scales(path, want)
    assert_same_bundles(load_scales(path, spec() if checked else None), want)
    assert_same_bundles(load_scales(str(path)), want)


def test_bfloat16_is_read_in_a_fresh_interpreter(tmp_path, run_python):
    path = tmp_path / "scales.safetensors"
    save_scales(path, bundles("bfloat16"))
    done = run_python(
        "from fastkv.scales import load_scales\n"
        f"print(load_scales({str(path)!r})[0].k_quant.view('uint16').tolist())"
    )
    assert json.loads(done.stdout) == bundles("bfloat16")[0].k_quant.view("uint16").tolist()


def test_layers_come_in_order(tmp_path):
    many = dict.fromkeys((11, 2, 100, 0), bundles()[3])
    save_scales(tmp_path / "f", many)
    assert list(load_scales(tmp_path / "f")) == [0, 2, 11, 100]


def test_any_values_survive(tmp_path):
    # Values are validate's business, and only where a spec comes along.
    odd = np.array([np.nan, -0.0, np.inf], np.float32)
    want = {0: bundles()[3].map(lambda _: odd)}
    save_scales(tmp_path / "f", want)
    assert_same_bundles(load_scales(tmp_path / "f"), want)


def test_strided_arrays_are_saved_in_order(tmp_path):
    want = bundles()
    turned = {i: b.map(lambda a: np.ascontiguousarray(a.T).T) for i, b in want.items()}
    save_scales(tmp_path / "f", turned)
    assert_same_bundles(load_scales(tmp_path / "f"), want)


def test_names_in_the_file_are_the_documented_ones(tmp_path):
    save_scales(tmp_path / "f", bundles())
    with safe_open(tmp_path / "f", framework="numpy") as file:
        names = set(file.keys())
    assert names == {
        f"layers.{layer}.{name}"
        for layer, fmt in enumerate(FORMATS)
        for name in FIELDS
        if fmt.startswith("cache") and (fmt == "cache_int4_zp" or not name.endswith("_zp"))
    }


def test_same_content_gives_the_same_bytes(tmp_path, run_python):
    save_scales(tmp_path / "one", bundles("bfloat16"))
    content = (tmp_path / "one").read_bytes()
    reordered = dict(reversed(bundles("bfloat16").items()))
    for i in range(5):
        save_scales(tmp_path / "two", reordered if i % 2 else bundles("bfloat16"))
        assert (tmp_path / "two").read_bytes() == content
    other = tmp_path / "three"
    run_python(
        "from fastkv.scales import load_scales, save_scales\n"
        f"save_scales({str(other)!r}, load_scales({str(tmp_path / 'one')!r}))"
    )
    assert other.read_bytes() == content


# With a spec


def test_missing_layer_is_named(tmp_path):
    incomplete = bundles()
    del incomplete[3]
    save_scales(tmp_path / "f", incomplete)
    with pytest.raises(MissingTensorError) as caught:
        load_scales(tmp_path / "f", spec())
    assert (caught.value.argument, caught.value.format) == ("layers.3", "cache_fp8")
    assert str(tmp_path / "f") in caught.value.got


def test_surplus_layer_is_refused(tmp_path):
    save_scales(tmp_path / "f", bundles() | {1: bundles()[0]})
    with pytest.raises(SurplusTensorError) as caught:
        load_scales(tmp_path / "f", spec())
    assert caught.value.format == "block_wise_fp8"
    assert caught.value.argument == "layer 1"
    assert str(tmp_path / "f") in caught.value.got


def test_layer_beyond_the_model_and_field_at_fault_are_named_with_the_file(tmp_path):
    path = tmp_path / "f"
    save_scales(path, bundles() | {len(FORMATS): bundles()[0]})
    with pytest.raises(LayerIndexError) as caught:
        load_scales(path, spec())
    assert f"layer {len(FORMATS)}: expected 0 to" in str(caught.value)
    assert str(path) in str(caught.value)
    some = {f"layers.0.{name}": np.ones(2, np.float32) for name in FIELDS[:5]}
    for left, word in ((some, "v_zp"), ({**some, "layers.0.odd": some["layers.0.k_zp"]}, "odd")):
        save_file(left, path, {"format": "fastkv.static_scales.v1"})
        with pytest.raises(ContractError) as caught:
            load_scales(path)
        assert "layers.0" in caught.value.argument
        assert word in str(caught.value)
        assert str(path) in caught.value.got


@pytest.mark.parametrize(
    ("layer", "change", "error"),
    [
        (0, lambda a: a * 0, ScaleError),
        (3, lambda a: a * np.float32(np.nan), ScaleError),
        (5, lambda a: a[:2], ShapeError),
        (2, lambda a: a.astype(np.float64), DtypeError),
    ],
)
def test_bundles_are_validated(tmp_path, layer, change, error):
    bad = bundles() | {layer: bundles()[layer].map(change)}
    save_scales(tmp_path / "f", bad)
    assert list(load_scales(tmp_path / "f")) == sorted(bad)
    with pytest.raises(error) as caught:
        load_scales(tmp_path / "f", spec())
    # File, layer, key, expected, got.
    assert caught.value.op == "load_scales"
    assert caught.value.argument.startswith(f"layers.{layer}.k_quant")
    assert caught.value.format == FORMATS[layer]
    assert caught.value.got.endswith(f" in {tmp_path / 'f'}")


def test_remark_is_a_warning_at_the_caller(tmp_path):
    odd = bundles()
    odd[3] = replace(odd[3], v_dequant=odd[3].v_dequant * np.float32(1.1))
    save_scales(tmp_path / "f", odd)
    with pytest.warns(ScaleWarning, match="^layer 3: v_quant x v_dequant is") as caught:
        load_scales(tmp_path / "f", spec())
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_scales(tmp_path / "f")


# Files that are none


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.9, 0.999])
@pytest.mark.parametrize(
    "load",
    [load_scales, lambda path: load_checkpoint(path, spec(), PREFIX)],
    ids=["load_scales", "load_checkpoint"],
)
def test_truncated_file_is_named(tmp_path, share, load):
    path = tmp_path / "scales.safetensors"
    save_scales(path, bundles())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ScaleError) as caught:
        load(path)
    assert caught.value.argument == str(path)
    assert caught.value.expected == "a whole safetensors file"
    assert caught.value.got


@pytest.mark.parametrize("content", [b"{}", b"not a file of tensors" * 9, bytes(64), b"\xff" * 64])
def test_file_of_another_kind_is_named(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ScaleError) as caught:
        load_scales(tmp_path / "f")
    assert caught.value.argument == str(tmp_path / "f")


def test_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_scales(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"format": "fastkv.static_scales.v2"}]
)
def test_safetensors_of_somebody_else_are_refused(tmp_path, metadata):
    save_file({"layers.0.k_quant": np.ones(3, np.float32)}, tmp_path / "f", metadata)
    with pytest.raises(ScaleError) as caught:
        load_scales(tmp_path / "f")
    assert caught.value.argument == str(tmp_path / "f")
    assert "fastkv.static_scales.v1" in caught.value.expected
    assert caught.value.got == repr(metadata and metadata["format"])


@pytest.mark.parametrize(
    "key",
    [
        "k_quant",
        "layers.k_quant",
        "layers.0.extra.k_quant",
        "layers.-1.k_quant",
        "layers.01.k_quant",
        "layers.x.k_quant",
        "layers.².k_quant",
        "Layers.0.k_quant",
    ],
)
def test_other_keys_are_refused(tmp_path, key):
    save_file({key: np.ones(3, np.float32)}, tmp_path / "f", {"format": "fastkv.static_scales.v1"})
    with pytest.raises(ScaleError) as caught:
        load_scales(tmp_path / "f")
    assert (caught.value.argument, caught.value.got) == (str(tmp_path / "f"), key)


@pytest.mark.parametrize(
    ("names", "got"),
    [
        (("k_quant", "k_dequant", "v_quant"), "no v_dequant"),
        (("k_zp", "v_zp"), "no k_quant, k_dequant, v_quant, v_dequant"),
        ((*FIELDS, "k_bias", "extra"), "unknown extra, k_bias"),
    ],
)
def test_incomplete_and_unknown_fields_are_named(tmp_path, names, got):
    tensors = {f"layers.7.{name}": np.ones(3, np.float32) for name in names}
    save_file(tensors, tmp_path / "f", {"format": "fastkv.static_scales.v1"})
    with pytest.raises(ScaleError) as caught:
        load_scales(tmp_path / "f")
    assert caught.value.argument == "layers.7"
    assert caught.value.got == f"{got} in {tmp_path / 'f'}"


def test_one_zero_point_of_two_is_refused(tmp_path):
    tensors = {f"layers.0.{name}": np.ones(3, np.float32) for name in FIELDS[:5]}
    save_file(tensors, tmp_path / "f", {"format": "fastkv.static_scales.v1"})
    with pytest.raises(MissingTensorError, match="v_zp"):
        load_scales(tmp_path / "f")


# Whole or not at all

SAVES = {
    "save_scales": save_scales,
    "save_checkpoint": lambda path, scales: save_checkpoint(path, scales, spec(), PREFIX),
    "save_fastdeploy_json": lambda path, scales: save_fastdeploy_json(path, scales, spec()),
}


def savable(layers=(0, 3, 5)):
    """Bundles that every one of the files can keep: inverse pairs, no zero points."""
    found = bundles()
    return {
        i: replace(found[i], k_dequant=1 / found[i].k_quant, v_dequant=1 / found[i].v_quant)
        for i in layers
    }


@contextmanager
def full_disk():
    """No file can grow past 100 bytes, as on a disk that is full; nor can pytest's own output."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", SAVES)
def test_failed_write_leaves_the_old_file(tmp_path, name):
    path = tmp_path / "scales"
    SAVES[name](path, savable())
    before = path.read_bytes()
    assert len(before) > 100
    with pytest.raises(OSError, match="too large"), full_disk():
        SAVES[name](path, savable((3, 5)))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["scales"]


@pytest.mark.parametrize("name", SAVES)
def test_refused_bundle_leaves_the_old_file(tmp_path, name):
    path = tmp_path / "scales"
    SAVES[name](path, savable())
    before = path.read_bytes()
    broken = savable()
    broken[5] = replace(broken[5], v_dequant=object())
    with pytest.raises(FastKVError):
        SAVES[name](path, broken)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["scales"]


@pytest.mark.parametrize("name", SAVES)
def test_saved_file_is_one_like_others(tmp_path, name):
    plain, path, link = tmp_path / "plain", tmp_path / "scales", tmp_path / "link"
    plain.write_bytes(b"")
    SAVES[name](path, savable((3, 5)))
    assert path.stat().st_mode == plain.stat().st_mode
    link.symlink_to(path)
    SAVES[name](link, savable())
    assert link.is_symlink()
    SAVES[name](plain, savable())
    assert path.read_bytes() == plain.read_bytes() == link.read_bytes()


@pytest.mark.parametrize("name", SAVES)
def test_absent_folder_is_an_error(tmp_path, name):
    with pytest.raises(FileNotFoundError):
        SAVES[name](tmp_path / "nowhere" / "scales", savable())
