# SPDX-License-Identifier: Apache-2.0
"""`fastkv calibrate` on a tiny random Llama: its files, and what is refused before any work."""

import json
import sys

import numpy as np
import pytest

from fastkv import CacheSpec
from fastkv.calibrate import source
from fastkv.calibrate.gguf import observe_llama
from fastkv.calibrate.methods import Recipe, recommended
from fastkv.calibrate.observe import Observer
from fastkv.cli import main
from fastkv.eval.text import Span
from fastkv.quant import QUANT_SPECS
from fastkv.scales import FIELDS, load_checkpoint, load_fastdeploy_json, load_scales
from helpers import plain_llama

LAYERS, HEADS, DIM = 3, 2, 16
STATIC = [name for name, row in QUANT_SPECS.items() if row.needs_static]


def run(monkeypatch, *arguments):
    """The exit code of `fastkv calibrate`."""
    monkeypatch.setattr(sys, "argv", ["fastkv", "calibrate", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


@pytest.fixture
def tiny(monkeypatch):
    """Put a tiny model and tokens where real ones would be loaded."""
    rng = np.random.default_rng(12)
    model = plain_llama.random_llama(rng)
    model.weights["blk.1.attn_v.weight"][DIM:] *= 40  # head 1 stands out
    sequences = source.cut(rng.integers(0, 97, 100), 60, None)

    def feed(observer):
        observe_llama(model, sequences, observer, interleaved=False)

    loaded = source.Source("tiny 1", "t.txt", "00", Span(0, 100), sequences, LAYERS, feed)
    monkeypatch.setattr(source, "load", lambda *_, **__: loaded)
    return loaded


def expected(tiny, name, recipe, granularity=None):
    observer = Observer(LAYERS, recipe.by_attention)
    tiny.run(observer)
    return observer.scales(QUANT_SPECS[name], granularity, recipe)


def assert_same(got, want, tolerance=0.0):
    assert sorted(got) == sorted(want) == [0, 1, 2]
    for layer, bundle in got.items():
        for field in FIELDS:
            a, b = getattr(bundle, field), getattr(want[layer], field)
            assert (a is None) is (b is None), field
            if a is not None:
                np.testing.assert_allclose(a, b, rtol=tolerance, err_msg=field)


@pytest.mark.parametrize("name", STATIC)
def test_fastkvs_own_file_holds_the_recommended_scales(monkeypatch, tmp_path, tiny, name):
    path = tmp_path / "scales.safetensors"
    assert run(monkeypatch, "--format", name, "-o", path) == 0
    row = QUANT_SPECS[name]
    got = load_scales(path, CacheSpec(LAYERS, HEADS, DIM, 16, name))
    assert_same(got, expected(tiny, name, recommended(row, row.granularities[0])))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("prefix", [None, "x.{layer}.attn"])
def test_fastdeploys_json_reads_back(monkeypatch, tmp_path, tiny, prefix):
    path = tmp_path / "kv_cache_scale.json"
    options = [] if prefix is None else ["--prefix", prefix]
    assert (
        run(monkeypatch, "--format", "cache_fp8", "-o", path, "--write", "fastdeploy", *options)
        == 0
    )
    spec = CacheSpec(LAYERS, HEADS, DIM, 64, "cache_fp8")
    given = {} if prefix is None else {"prefix": prefix}
    assert_same(
        load_fastdeploy_json(path, spec, **given), expected(tiny, "cache_fp8", Recipe()), 1e-6
    )


@pytest.mark.parametrize("name", STATIC)
def test_checkpoint_keys_read_back(monkeypatch, tmp_path, tiny, name):
    path = tmp_path / "scales.safetensors"
    options = ("--write", "checkpoint", "--method", "percentile", "--percentile", 99)
    assert run(monkeypatch, "--format", name, "-o", path, *options) == 0
    got = load_checkpoint(
        path, CacheSpec(LAYERS, HEADS, DIM, 64, name), "model.layers.{layer}.self_attn"
    )
    assert_same(got, expected(tiny, name, Recipe("percentile", percentile=99)), 1e-6)


def test_every_option_of_the_recipe_arrives(monkeypatch, tmp_path, tiny):
    path = tmp_path / "s.safetensors"
    options = ("--method", "mse", "--weights", "attention", "--headroom", 1.25, "--k-power", 4)
    arguments = ("--format", "cache_int8", "--granularity", "channel", "-o", path)
    assert run(monkeypatch, *arguments, *options) == 0
    recipe = Recipe("mse", 1.25, weights="attention", k_power=4)
    assert_same(load_scales(path), expected(tiny, "cache_int8", recipe, "channel"))
    assert run(monkeypatch, *arguments, "--headroom", 2, "--force") == 0  # of the recommended one
    assert_same(load_scales(path), expected(tiny, "cache_int8", Recipe(headroom=2), "channel"))


def test_table_json_and_plot_name_the_outlier_head(monkeypatch, capsys, tmp_path, tiny):
    path, rows, picture = (tmp_path / name for name in ("s.safetensors", "rows.json", "r.svg"))
    options = ("-o", path, "--json", rows, "--plot", picture)
    assert run(monkeypatch, "--format", "cache_int8", *options) == 0
    printed = capsys.readouterr().out
    document = json.loads(rows.read_text())
    (outlier,) = document["outliers"]
    assert (outlier["layer"], outlier["side"], outlier["head"]) == (1, "v", 1)
    assert f"V 1 ({outlier['ratio']:.1f}×)" in printed
    svg = picture.read_text()
    assert "<!-- layer 1 head 1: " in svg
    observer = Observer(LAYERS)
    tiny.run(observer)
    for layer in range(LAYERS):
        for side in observer.sides(layer):
            amax = np.abs([side.low, side.high]).max(axis=(0, 2))
            entry = document["layers"][layer]
            np.testing.assert_allclose(entry[f"{side.name}_amax"], amax)
            np.testing.assert_allclose(entry[f"{side.name}_covered"], amax, rtol=1e-6)
    median = np.median([entry["v_amax"] for entry in document["layers"]])
    assert outlier["ratio"] == pytest.approx(outlier["amax"] / median)
    assert document["method"] == "minmax"
    assert document["tokens"] == "0:100"
    assert document["sequences"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.svg", "rows.json", "s.safetensors"]


def test_json_alone_goes_to_standard_output(monkeypatch, capsys, tmp_path, tiny):
    arguments = ("--format", "cache_int8", "-o", tmp_path / "s", "--json", "-")
    assert run(monkeypatch, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "cache_int8"


# What is refused, before a model is loaded


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--format", "int8"), "--format: expected one of none, cache_int8"),
        (("--format", "none"), "expected a format with static scales, got none"),
        (("--format", "block_wise_fp8"), "expected a format with static scales"),
        (("--method", "minmx"), "Did you mean 'minmax'?"),
        (("--weights", "heavy"), "--weights: expected one of uniform, attention"),
        (("--percentile", "5"), "--percentile: expected above 50, at most 100, got 5.0"),
        (("--headroom", "-1"), "--headroom: expected finite and > 0, got -1.0"),
        (("--k-power", "0"), "--k-power: expected 1 to 8, got 0"),
        (("--granularity", "page"), "--granularity (format cache_int8): expected head or channel"),
        (("--format", "cache_fp8", "--granularity", "channel"), "--granularity"),
        (("--write", "gguf"), "--write: expected one of safetensors, fastdeploy, checkpoint"),
        (("--format", "cache_int4_zp", "--write", "fastdeploy"), "a place for zero points"),
        (("--write", "checkpoint", "--prefix", "model.layers"), "a module path with {layer} in it"),
        (("--prefix", "x.{layer}"), "--prefix: expected no prefix for fastkv's own files"),
        (("-o", "no/such/s.safetensors"), "no folder"),
        (("-o", "."), "--output '.' is a folder"),
        (("-o", "there"), "--output: expected a file that does not exist, got there. --force"),
        (("--json", "no/such/rows.json"), "rows.json"),
        (("--plot", "no/such/r.png"), "r.png"),
        (("--plot", "r.xyz"), "--plot: expected a name that ends in"),
        (("--json", "./s.safetensors"), "--json: expected another file than --output"),
        (("-o", "r.png", "--plot", "r.png"), "--plot: expected another file than --output"),
        (("--plot", "r.svg", "--json", "r.svg"), "--plot: expected another file than --json"),
        (("--percentile", "99"), "--percentile: expected --method percentile, which reads it"),
        (("--weights", "attention"), "--weights: expected --method percentile or mse, which"),
        (("--method", "percentile", "--k-power", "3"), "--k-power: expected --method mse, which"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_a_wrong_call_is_one_line_and_nothing_is_read(
    monkeypatch, capsys, mocker, tmp_path, arguments, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("before")
    load = mocker.patch.object(source, "load")
    defaults = ("--format", "cache_int8", "-o", "s.safetensors")
    assert run(monkeypatch, *defaults, *arguments) == 2
    printed = capsys.readouterr()
    assert says in " ".join(printed.err.split())
    assert printed.out == ""
    assert load.call_count == 0
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "before"


def test_a_folder_that_takes_no_files_is_named(monkeypatch, capsys, mocker, tmp_path):
    load = mocker.patch.object(source, "load")
    mocker.patch("os.access", return_value=False)  # root may write anywhere
    assert run(monkeypatch, "--format", "cache_fp8", "-o", tmp_path / "s") == 2
    assert f"nothing can be written to the folder '{tmp_path}'" in capsys.readouterr().err
    assert load.call_count == 0


def test_without_matplotlib_plot_says_so_before_working(monkeypatch, capsys, mocker, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    load = mocker.patch.object(source, "load")
    arguments = ("--format", "cache_fp8", "-o", tmp_path / "s", "--plot", tmp_path / "x.png")
    assert run(monkeypatch, *arguments) == 2
    assert "pip install 'fastkv[plot]'" in capsys.readouterr().err
    assert load.call_count == 0


def test_an_existing_file_is_replaced_by_force_alone(monkeypatch, tmp_path, tiny):
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"before")
    assert run(monkeypatch, "--format", "cache_int8", "-o", path) == 2
    assert path.read_bytes() == b"before"
    assert run(monkeypatch, "--format", "cache_int8", "-o", path, "--force") == 0
    assert sorted(load_scales(path)) == [0, 1, 2]


@pytest.mark.parametrize("content", ["", " \n\n\t\n"])
def test_an_empty_text_is_named(monkeypatch, capsys, tmp_path, content):
    text = tmp_path / "empty.txt"
    text.write_text(content)
    out = tmp_path / "s.safetensors"
    assert run(monkeypatch, "--format", "cache_int8", "-o", out, "--text", text) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "fastkv calibrate: --text: expected a text, got empty.txt, which is empty" in err
    assert not out.exists()


def test_errors_that_eval_shares_name_this_command(monkeypatch, capsys, tmp_path):
    common = ("--format", "cache_int8", "-o", tmp_path / "s")
    for arguments, says in (
        (("--text", "no-such.txt"), "fastkv calibrate: --text: expected a text file"),
        (("--tokens", "9:3"), "fastkv calibrate: --tokens: expected start:stop"),
        (("--model", "no-such.gguf"), "fastkv calibrate: --model: expected a GGUF file"),
        (("--model", "x", "--interleaved"), "--interleaved: expected a GGUF file, got x"),
    ):
        assert run(monkeypatch, *common, *arguments) == 2
        assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("gguf", ("--model", "m.gguf")),
        ("torch", ("--model", "m")),
        ("transformers", ("--model", "m")),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    monkeypatch, capsys, tmp_path, package, arguments
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    if package == "transformers":
        monkeypatch.setitem(sys.modules, "torch", sys)  # stands for one that is there
    monkeypatch.setitem(sys.modules, package, None)
    assert run(monkeypatch, "--format", "cache_fp8", "-o", "s", *arguments) == 2
    extra = "eval" if package == "gguf" else "transformers"
    err = capsys.readouterr().err
    assert f"fastkv calibrate needs {package}, which is not installed: pip install" in err
    assert f"fastkv[{extra}]" in err


# Nothing half-written


def test_nan_activations_leave_nothing_behind(monkeypatch, capsys, tmp_path, tiny):
    def poisoned(observer):
        k = np.ones((4, HEADS, DIM), np.float32)
        v = k.copy()
        v[3, 1, 5] = np.nan
        observer.add(0, k, k, v, 1.0)

    object.__setattr__(tiny, "run", poisoned)
    options = ("--plot", tmp_path / "r.png", "--json", tmp_path / "r.json")
    assert run(monkeypatch, "--format", "cache_int8", "-o", tmp_path / "s", *options) == 2
    err = capsys.readouterr().err
    assert "V of layer 0: expected finite values, got nan at token 3, head 1, channel 5" in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_hands_over_some_layers_only_leaves_nothing_behind(
    monkeypatch, capsys, tmp_path, tiny
):
    k = np.ones((4, HEADS, DIM), np.float32)
    object.__setattr__(tiny, "run", lambda observer: observer.add(1, k, k, k, 1.0))
    assert run(monkeypatch, "--format", "cache_int8", "-o", tmp_path / "s") == 2
    assert "layers 0, 2: expected K and V of all 3 layers" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_constant_model_still_gives_scales_that_validate(monkeypatch, tmp_path, tiny):
    """A range of zero gets the smallest range of the formulas."""
    k = np.full((4, HEADS, DIM), 2.5, np.float32)
    k[:, 0] = 0

    def constant(observer):
        for layer in range(LAYERS):
            observer.add(layer, k, k, k, 1.0)

    object.__setattr__(tiny, "run", constant)
    for name in STATIC:
        for method in ("minmax", "percentile", "mse"):
            path = tmp_path / f"{name}.{method}"
            assert run(monkeypatch, "--format", name, "-o", path, "--method", method) == 0
            load_scales(path, CacheSpec(LAYERS, HEADS, DIM, 16, name))


@pytest.mark.parametrize("where", ["observing", "writing"])
def test_ctrl_c_leaves_no_file(monkeypatch, tmp_path, tiny, where):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if where == "observing":
        object.__setattr__(tiny, "run", interrupt)
    else:
        monkeypatch.setattr("pathlib.Path.replace", interrupt)  # the last step of a write
    options = ("--plot", tmp_path / "r.png", "--json", tmp_path / "r.json")
    assert run(monkeypatch, "--format", "cache_int8", "-o", tmp_path / "s", *options) != 0
    assert list(tmp_path.iterdir()) == []


def test_help_has_examples(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    assert "Examples" in printed
    assert "fastkv calibrate --format cache_int4_zp" in printed
