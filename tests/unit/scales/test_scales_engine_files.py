# SPDX-License-Identifier: Apache-2.0
"""FastDeploy's files: the multipliers that its loader computes are the bundle's, both ways.

The loader is written down again here, from what the engine does: it flattens a scale and sets a
parameter of one dimension; a zero point is set as it stands.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastkv import CacheSpec, StaticScales
from fastkv.arrays import numpy_dtype
from fastkv.errors import (
    ContractError,
    MissingTensorError,
    ScaleError,
    ScaleWarning,
    ShapeError,
    SurplusTensorError,
    UnsupportedError,
)
from fastkv.scales import (
    FIELDS,
    load_checkpoint,
    load_fastdeploy_json,
    save_checkpoint,
    save_fastdeploy_json,
)
from helpers.batches import static_scales
from helpers.compare import EPS, assert_same_bits
from helpers.oracle import values_of

HEADS, DIM = 3, 8
PREFIX = "model.layers.{layer}.self_attn"
ENGINE_BOUNDS = {"cache_int8": 127.0, "cache_fp8": 448.0}
VARIANTS = [
    ("cache_int8", "channel"),
    ("cache_int8", "flat"),
    ("cache_int8", "head"),
    ("cache_fp8", "head"),
    ("cache_int4_zp", "channel"),
    ("cache_int4_zp", "flat"),
]
SYMMETRIC = VARIANTS[:4]
MIXED = ("cache_int8", "none", "cache_fp8", "block_wise_fp8", "cache_int4_zp")


def spec(*formats):
    return CacheSpec(len(formats), HEADS, DIM, 4, formats)


def inverse(rng, fmt, granularity=None, dtype="float32"):
    """A bundle whose pairs are inverse, as one number can keep them."""
    bundle = static_scales(rng, fmt, HEADS, DIM, granularity, dtype)
    if bundle is None:
        return None
    return replace(bundle, k_dequant=1 / bundle.k_quant, v_dequant=1 / bundle.v_quant)


def mixed_bundles(seed=0):
    rng = np.random.default_rng(seed)
    found = {i: inverse(rng, fmt) for i, fmt in enumerate(MIXED)}
    return {i: bundle for i, bundle in found.items() if bundle is not None}


def key(layer, side, what="scale", prefix="model.layers.{}.self_attn"):
    return f"{prefix.format(layer)}.cache{side}_matmul.activation_{what}"


# The engine


def engine_multipliers(fmt, scale):
    """Quant and dequant multipliers that the engine derives from an activation scale."""
    scale = values_of(scale).reshape(-1)
    if fmt == "cache_int4_zp":
        return 1 / scale, scale
    return ENGINE_BOUNDS[fmt] / scale, scale / ENGINE_BOUNDS[fmt]


def engine_load(tensors, fmt, layer, side, **where):
    """What the engine's layer holds after loading: quant, dequant and zero point, flat."""
    quant, dequant = engine_multipliers(fmt, tensors[key(layer, side, **where)])
    zero_point = None
    if fmt == "cache_int4_zp":
        zero_point = tensors[key(layer, side, "zero_point", **where)]
        assert zero_point.shape == (HEADS * DIM,), "the engine's parameter has one dimension"
    return quant, dequant, zero_point


def engine_load_json(values, layer, side):
    """The engine multiplies by 448 and goes on as with a checkpoint."""
    name = key(layer, side, prefix="ernie.layers.{}.self_attn")
    return np.asarray(values[name], np.float64) * 448.0


def engine_files(rng, fmt, dtype="float32", layer=0, shape=None):
    """Checkpoint tensors of one layer as a calibration tool writes them."""
    shape = shape or ((HEADS,) if fmt == "cache_fp8" else (HEADS * DIM,))
    tensors = {}
    for side in "kv":
        scale = rng.uniform(0.05, 0.4, shape) * (1 if fmt == "cache_int4_zp" else 60)
        tensors[key(layer, side)] = scale.astype(numpy_dtype(dtype))
        if fmt == "cache_int4_zp":
            zero_point = rng.uniform(-11, 11, shape)
            tensors[key(layer, side, "zero_point")] = zero_point.astype(numpy_dtype(dtype))
    return tensors


def assert_multipliers(bundle, side, quant, dequant, zero_point=None, rtol=4 * EPS):
    for name, want in (("quant", quant), ("dequant", dequant)):
        got = getattr(bundle, f"{side}_{name}")
        np.testing.assert_allclose(values_of(got).reshape(-1), want, rtol=rtol)
    if zero_point is None:
        assert getattr(bundle, f"{side}_zp") is None
    else:
        got = getattr(bundle, f"{side}_zp")
        np.testing.assert_array_equal(values_of(got).reshape(-1), values_of(zero_point).reshape(-1))


# Checkpoints


@pytest.mark.parametrize(("fmt", "granularity"), VARIANTS)
def test_engine_reads_the_multipliers_that_were_saved(tmp_path, fmt, granularity):
    bundle = inverse(np.random.default_rng(1), fmt, granularity)
    save_checkpoint(tmp_path / "f", {0: bundle}, spec(fmt), PREFIX)
    tensors = load_file(tmp_path / "f")
    for side in "kv":
        quant, dequant, zero_point = engine_load(tensors, fmt, 0, side)
        assert_multipliers(bundle, side, quant, dequant, zero_point)


@pytest.mark.parametrize("fmt", ["cache_int8", "cache_fp8", "cache_int4_zp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_multipliers_are_read_as_the_engine_reads_them(tmp_path, fmt, dtype):
    tensors = engine_files(np.random.default_rng(2), fmt, dtype)
    save_file(tensors, tmp_path / "f")
    bundle = load_checkpoint(tmp_path / "f", spec(fmt), PREFIX)[0]
    for side in "kv":
        assert_multipliers(bundle, side, *engine_load(tensors, fmt, 0, side))
    for name in FIELDS:
        array = getattr(bundle, name)
        if array is not None:
            assert array.dtype == np.float32
            assert array.shape == ((HEADS,) if fmt == "cache_fp8" else (HEADS, DIM))


@pytest.mark.parametrize("shape", [(HEADS, DIM), (HEADS * DIM,), (1, HEADS * DIM), (HEADS, 1, DIM)])
def test_shape_in_the_file_does_not_matter(tmp_path, shape):
    tensors = engine_files(np.random.default_rng(3), "cache_int8", shape=shape)
    save_file(tensors, tmp_path / "f")
    bundle = load_checkpoint(tmp_path / "f", spec("cache_int8"), PREFIX)[0]
    assert bundle.k_quant.shape == (HEADS, DIM)
    assert_multipliers(bundle, "k", *engine_load(tensors, "cache_int8", 0, "k"))


@pytest.mark.parametrize(("fmt", "granularity"), VARIANTS)
def test_checkpoint_round_trip(tmp_path, fmt, granularity):
    want = inverse(np.random.default_rng(4), fmt, granularity)
    save_checkpoint(tmp_path / "f", {0: want}, spec(fmt), PREFIX)
    got = load_checkpoint(tmp_path / "f", spec(fmt), PREFIX)[0]
    for side in "kv":
        fields = (getattr(want, f"{side}_{name}") for name in ("quant", "dequant"))
        flat = [values_of(array).reshape(-1) for array in fields]
        assert_multipliers(got, side, *flat, getattr(want, f"{side}_zp"))


def test_mixed_layers_in_many_files_among_other_tensors(tmp_path):
    bundles, whole = mixed_bundles(), spec(*MIXED)
    save_checkpoint(tmp_path / "all", bundles, whole, PREFIX)
    tensors = load_file(tmp_path / "all")
    assert len(tensors) == 3 * 2 + 2, "two scales a static layer, and two zero points"
    paths = []
    for i, (name, tensor) in enumerate(sorted(tensors.items(), reverse=True)):
        weight = {f"model.layers.{i}.mlp.weight": np.full((4, 4), np.nan, np.float32)}
        paths.append(tmp_path / f"model-{i:05}-of-{len(tensors):05}.safetensors")
        save_file({name: tensor} | weight, paths[-1])
    together = load_checkpoint(tmp_path / "all", whole, PREFIX)
    for got in (
        load_checkpoint(paths, whole, PREFIX),
        load_checkpoint(iter(map(str, paths)), whole, PREFIX),
    ):
        assert list(got) == list(together) == [0, 2, 4]
        for layer in got:
            for name in FIELDS:
                if (want := getattr(together[layer], name)) is not None:
                    assert_same_bits(getattr(got[layer], name), want)
    with pytest.raises(MissingTensorError) as caught:
        load_checkpoint(paths[:-1], whole, PREFIX)
    (absent,) = set(tensors) - set().union(*(load_file(path) for path in paths[:-1]))
    assert caught.value.argument == absent
    assert all(str(path) in caught.value.got for path in paths[:-1])


@pytest.mark.parametrize("what", ["scale", "zero_point"])
@pytest.mark.parametrize("side", ["k", "v"])
def test_missing_key_is_named(tmp_path, what, side):
    tensors = engine_files(np.random.default_rng(5), "cache_int4_zp")
    del tensors[key(0, side, what)]
    save_file(tensors, tmp_path / "f")
    with pytest.raises(MissingTensorError) as caught:
        load_checkpoint(tmp_path / "f", spec("cache_int4_zp"), PREFIX)
    error = caught.value
    assert (error.argument, error.format) == (key(0, side, what), "cache_int4_zp")
    assert str(tmp_path / "f") in error.got


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("fmt", ["cache_int8", "cache_fp8", "cache_int4_zp"])
def test_scales_that_nobody_can_use_are_named(tmp_path, fmt, side, value):
    tensors = engine_files(np.random.default_rng(6), fmt)
    tensors[key(0, side)][1] = value
    save_file(tensors, tmp_path / "f")
    with pytest.raises(ScaleError) as caught:
        load_checkpoint(tmp_path / "f", spec(fmt), PREFIX)
    error = caught.value
    assert (error.argument, error.format) == (key(0, side), fmt)
    assert f" at [1] in {tmp_path / 'f'}" in error.got.replace("[0, 1]", "[1]")
    assert ("created and never filled" in error.hint) == (value == 0)


def test_scales_that_were_never_filled_are_refused(tmp_path):
    tensors = {
        name: np.zeros_like(t)
        for name, t in engine_files(np.random.default_rng(0), "cache_fp8").items()
    }
    save_file(tensors, tmp_path / "f")
    with pytest.raises(ScaleError, match=r"0\.0 at \[0\] in .*created and never filled"):
        load_checkpoint(tmp_path / "f", spec("cache_fp8"), PREFIX)


def test_zero_point_that_is_not_finite_is_refused(tmp_path):
    tensors = engine_files(np.random.default_rng(7), "cache_int4_zp")
    tensors[key(0, "v", "zero_point")][5] = np.nan
    save_file(tensors, tmp_path / "f")
    with pytest.raises(ScaleError) as caught:
        load_checkpoint(tmp_path / "f", spec("cache_int4_zp"), PREFIX)
    assert caught.value.argument == key(0, "v", "zero_point") + "[0, 5]"
    assert caught.value.got == f"nan in {tmp_path / 'f'}"


@pytest.mark.parametrize(
    ("fmt", "shape"),
    [
        ("cache_fp8", (HEADS * DIM,)),
        ("cache_fp8", (1,)),
        ("cache_int8", (HEADS + 1,)),
        ("cache_int8", ()),
        ("cache_int4_zp", (HEADS,)),  # per head, as the engine creates it and then reads too far
    ],
)
def test_sizes_that_fit_no_granularity_are_named(tmp_path, fmt, shape):
    tensors = engine_files(np.random.default_rng(8), fmt)
    tensors[key(0, "v")] = np.full(shape, 0.5, np.float32)
    save_file(tensors, tmp_path / "f")
    with pytest.raises(ShapeError) as caught:
        load_checkpoint(tmp_path / "f", spec(fmt), PREFIX)
    error = caught.value
    assert (error.argument, error.format) == (key(0, "v"), fmt)
    assert error.got == f"{int(np.prod(shape))} numbers in {tmp_path / 'f'}"


def test_scales_that_are_all_one_are_remarked_on(tmp_path):
    tensors = {key(0, side): np.full(HEADS, 448, np.float32) for side in "kv"}
    save_file(tensors, tmp_path / "f")
    with pytest.warns(ScaleWarning, match="layer 0: every multiplier is 1.0") as caught:
        load_checkpoint(tmp_path / "f", spec("cache_fp8"), PREFIX)
    assert [warning.filename for warning in caught] == [__file__]


def test_layers_are_told_apart_by_the_prefix(tmp_path):
    rng = np.random.default_rng(9)
    tensors = engine_files(rng, "cache_fp8", layer=1) | engine_files(rng, "cache_fp8", layer=11)
    tensors |= engine_files(rng, "cache_fp8", layer=0)
    save_file(tensors, tmp_path / "f")
    loaded = load_checkpoint(tmp_path / "f", spec("cache_fp8", "cache_fp8"), PREFIX)
    for layer in (0, 1):
        assert_multipliers(loaded[layer], "v", *engine_load(tensors, "cache_fp8", layer, "v"))


@pytest.mark.parametrize(
    "prefix", ["model.layers.0.self_attn", "", "model.layers.{}.self_attn", "model.{Layer}"]
)
def test_prefix_without_its_layer_is_refused(tmp_path, prefix):
    bundle, one = mixed_bundles()[2], spec("cache_fp8")
    (tmp_path / "f.json").write_text("{}")
    save_checkpoint(tmp_path / "f", {0: bundle}, one, PREFIX)
    before = (tmp_path / "f").read_bytes()
    for call in (
        lambda: save_checkpoint(tmp_path / "f", {0: bundle}, one, prefix),
        lambda: load_checkpoint(tmp_path / "f", one, prefix),
        lambda: save_fastdeploy_json(tmp_path / "f", {0: bundle}, one, prefix),
        lambda: load_fastdeploy_json(tmp_path / "f.json", one, prefix),
    ):
        with pytest.raises(ContractError) as caught:
            call()
        assert (caught.value.argument, caught.value.got) == ("prefix", repr(prefix))
        assert "{layer}" in caught.value.expected
    assert (tmp_path / "f").read_bytes() == before


def test_prefix_may_hold_other_braces(tmp_path):
    bundle, prefix = mixed_bundles()[2], "{model}.{layer}.attn{}"
    save_checkpoint(tmp_path / "f", {0: bundle}, spec("cache_fp8"), prefix)
    assert set(load_file(tmp_path / "f")) == {
        f"{{model}}.0.attn{{}}.cache{side}_matmul.activation_scale" for side in "kv"
    }
    assert 0 in load_checkpoint(tmp_path / "f", spec("cache_fp8"), prefix)


def test_checkpoint_of_the_same_content_has_the_same_bytes(tmp_path):
    whole = spec(*MIXED)
    for name in ("one", "two"):
        save_checkpoint(tmp_path / name, mixed_bundles(), whole, PREFIX)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


# kv_cache_scale.json


@pytest.mark.parametrize(("fmt", "granularity"), SYMMETRIC)
def test_engine_reads_the_multipliers_of_the_json(tmp_path, fmt, granularity):
    bundle = inverse(np.random.default_rng(10), fmt, granularity)
    save_fastdeploy_json(tmp_path / "f.json", {0: bundle}, spec(fmt))
    values = json.loads((tmp_path / "f.json").read_text())
    assert set(values) == {key(0, side, prefix="ernie.layers.{}.self_attn") for side in "kv"}
    for side in "kv":
        scale = engine_load_json(values, 0, side)
        assert_multipliers(bundle, side, *engine_multipliers(fmt, scale))


@pytest.mark.parametrize(
    ("fmt", "shape"),
    [("cache_fp8", (HEADS,)), ("cache_int8", (HEADS * DIM,)), ("cache_int8", (HEADS, DIM))],
)
def test_json_is_read_as_the_engine_reads_it(tmp_path, fmt, shape):
    rng = np.random.default_rng(11)
    values = {
        key(layer, side, prefix="ernie.layers.{}.self_attn"): rng.uniform(0.01, 0.3, shape).tolist()
        for layer in (0, 2)
        for side in "kv"
    }
    (tmp_path / "f.json").write_text(json.dumps(values))
    loaded = load_fastdeploy_json(tmp_path / "f.json", spec(fmt, "none", fmt))
    assert list(loaded) == [0, 2]
    for layer, bundle in loaded.items():
        for side in "kv":
            quant, dequant = engine_multipliers(fmt, engine_load_json(values, layer, side))
            assert_multipliers(bundle, side, quant, dequant)


def test_json_and_checkpoint_hold_the_same_scales(tmp_path):
    rng = np.random.default_rng(12)
    bundles, both = {i: inverse(rng, "cache_fp8") for i in (0, 1)}, spec("cache_fp8", "cache_fp8")
    save_fastdeploy_json(tmp_path / "f.json", bundles, both, "m.{layer}")
    save_checkpoint(tmp_path / "f", bundles, both, "m.{layer}")
    one = load_fastdeploy_json(tmp_path / "f.json", both, "m.{layer}")
    two = load_checkpoint(tmp_path / "f", both, "m.{layer}")
    for layer in (0, 1):
        for name in FIELDS[:4]:
            np.testing.assert_allclose(
                getattr(one[layer], name), getattr(two[layer], name), rtol=4 * EPS
            )


def test_json_has_no_place_for_zero_points(tmp_path):
    bundle, one = mixed_bundles()[4], spec("cache_int4_zp")
    with pytest.raises(UnsupportedError, match="no place for them"):
        save_fastdeploy_json(tmp_path / "f.json", {0: bundle}, one)
    assert not (tmp_path / "f.json").exists()
    (tmp_path / "f.json").write_text("{}")
    with pytest.raises(UnsupportedError) as caught:
        load_fastdeploy_json(tmp_path / "f.json", spec("none", "cache_int4_zp"))
    assert caught.value.format == "cache_int4_zp"
    assert "safetensors" in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": [1.0', b"[1, 2]", b"3", b"null", b"\xff\xfe{}", b"kv_cache_scale"],
)
def test_file_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ScaleError) as caught:
        load_fastdeploy_json(tmp_path / "f.json", spec("cache_fp8"))
    assert caught.value.argument == str(tmp_path / "f.json")
    assert caught.value.expected == "a JSON object of activation scales"
    assert caught.value.got


def json_file(path, k, v):
    names = [key(0, side, prefix="ernie.layers.{}.self_attn") for side in "kv"]
    path.write_text(json.dumps(dict(zip(names, (k, v), strict=True))))
    return names


@pytest.mark.parametrize(
    "value",
    [
        "high",
        ["a", "b", "c"],
        [[1.0, 2.0], [1.0]],
        {"a": 1.0},
        [None] * 3,
        [10**400] * 3,
        [1e39] * 3,
    ],
)
def test_json_value_that_is_no_list_of_numbers_is_named(tmp_path, value):
    names = json_file(tmp_path / "f.json", [1.0] * HEADS, value)
    with pytest.raises(ScaleError) as caught:
        load_fastdeploy_json(tmp_path / "f.json", spec("cache_fp8"))
    assert caught.value.argument == names[1]
    assert str(tmp_path / "f.json") in caught.value.got


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf"), 1e-60])
def test_json_scale_that_nobody_can_use_is_named(tmp_path, value):
    names = json_file(tmp_path / "f.json", [0.5, value, 0.5], [0.5] * HEADS)
    with pytest.raises(ScaleError) as caught:
        load_fastdeploy_json(tmp_path / "f.json", spec("cache_fp8"))
    assert (caught.value.argument, caught.value.format) == (names[0], "cache_fp8")
    assert str(tmp_path / "f.json") in caught.value.got


@pytest.mark.parametrize("value", [0.25, [0.25], [0.25] * 2])
def test_json_scale_of_another_size_is_named(tmp_path, value):
    names = json_file(tmp_path / "f.json", [0.5] * HEADS, value)
    with pytest.raises(ShapeError) as caught:
        load_fastdeploy_json(tmp_path / "f.json", spec("cache_fp8"))
    assert caught.value.argument == names[1]


def test_json_without_a_key_is_named(tmp_path):
    names = json_file(tmp_path / "f.json", [0.5] * HEADS, [0.5] * HEADS)
    with pytest.raises(MissingTensorError) as caught:
        load_fastdeploy_json(tmp_path / "f.json", spec("cache_fp8", "cache_fp8"))
    assert caught.value.argument == names[0].replace(".0.", ".1.")
    assert str(tmp_path / "f.json") in caught.value.got


# What cannot be kept

SAVES = {
    "save_checkpoint": lambda *args: save_checkpoint(*args, PREFIX),
    "save_fastdeploy_json": save_fastdeploy_json,
}


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("product", [1.005, 0.99, 1.5])
def test_pair_that_is_not_inverse_is_refused(tmp_path, name, side, product):
    bundle = mixed_bundles()[2]
    bundle = replace(
        bundle, **{f"{side}_dequant": getattr(bundle, f"{side}_dequant") * np.float32(product)}
    )
    with pytest.raises(ScaleError) as caught:
        SAVES[name](tmp_path / "f", {0: bundle}, spec("cache_fp8"))
    assert caught.value.argument == f"scales[0].{side}_quant, {side}_dequant"
    assert "save_scales keeps both" in caught.value.hint
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("name", SAVES)
def test_pair_of_two_granularities_is_refused(tmp_path, name):
    heads, channels = (
        StaticScales(*4 * [np.ones(s, np.float32)]) for s in ((HEADS,), (HEADS, DIM))
    )
    with pytest.raises(ScaleError, match="not inverse"):
        SAVES[name](
            tmp_path / "f", {0: replace(heads, k_dequant=channels.k_dequant)}, spec("cache_int8")
        )


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("value", [0.0, np.nan, -1.0])
def test_bundle_that_no_op_takes_is_not_saved(tmp_path, name, value):
    bundle = mixed_bundles()[2]
    bundle = bundle.map(lambda a: np.where(np.arange(len(a)) == 1, np.float32(value), a))
    with pytest.raises(ScaleError, match=r"static.k_quant\[1\]"):
        SAVES[name](tmp_path / "f", {0: bundle}, spec("cache_fp8"))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("fmt", ["none", "block_wise_fp8"])
def test_layer_without_static_scales_is_refused(tmp_path, name, fmt):
    with pytest.raises(SurplusTensorError) as caught:
        SAVES[name](tmp_path / "f", {0: mixed_bundles()[2]}, spec(fmt))
    assert caught.value.format == fmt


def test_zero_points_must_be_there(tmp_path):
    bundle = replace(mixed_bundles()[4], k_zp=None, v_zp=None)
    with pytest.raises(MissingTensorError, match=r"static.k_zp"):
        save_checkpoint(tmp_path / "f", {0: bundle}, spec("cache_int4_zp"), PREFIX)
