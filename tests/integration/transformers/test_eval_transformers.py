# SPDX-License-Identifier: Apache-2.0
"""`fastkv eval` on models of transformers, against caches that the tests quantize themselves."""

import json
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MambaConfig,
    PreTrainedTokenizerFast,
    QuantizedCache,
)

from fastkv.calibrate.transformers import TransformersModel
from fastkv.cli import main
from fastkv.errors import ContractError, MissingDependencyError, SpecError, UnsupportedError
from fastkv.eval.measure import Evaluation
from fastkv.eval.settings import Settings
from fastkv.eval.source import Source
from fastkv.eval.subject import PEERS
from fastkv.eval.text import Span
from fastkv.eval.transformers_model import HuggingFaceModel
from fastkv.quant import QUANT_SPECS
from helpers.tiny_models import VOCABULARY, tiny

READ, PREFILL, CHUNK = 90, 40, 16
INT8 = QUANT_SPECS["cache_int8"]


def saved(folder, config=None):
    """A tiny model and a tokenizer of its 97 words."""
    tiny(config, attention="eager").save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"?": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def ids():
    # The same ones: on one text in four an exact prefill is too little to tell the protocols apart.
    return np.random.default_rng(3).integers(0, VOCABULARY, 300)


def settings(*formats, peers=(), **options):
    rows = tuple(QUANT_SPECS[name] for name in formats)
    return Settings(
        rows, Span(0, READ), Span(100, 300), chunk=CHUNK, prefill=PREFILL, peers=peers, **options
    )


@pytest.fixture(scope="module")
def evaluation(folder, ids):
    model = HuggingFaceModel(TransformersModel(folder, head=True))
    return Evaluation(model, ids, settings(*QUANT_SPECS, peers=(PEERS["fp8"],)))


@pytest.fixture(scope="module")
def scales(evaluation):
    return evaluation.calibrated()


@pytest.fixture(scope="module")
def steps():
    return []


@pytest.fixture(scope="module")
def rows(evaluation, scales, steps):
    table = evaluation.scored(scales, steps.append)
    return {(row.format, row.exact_prefill): row for row in table.rows}


class Int8Cache(DynamicCache):
    """K and V through 8 bits per head; the first step attends to them as they are, if asked to."""

    def __init__(self, scales, exact_prefill):
        super().__init__()
        self.scales, self.exact_prefill = scales, exact_prefill

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        static, exact = self.scales[layer_idx], (key_states, value_states)
        by = torch.tensor(static.k_dequant), torch.tensor(static.v_dequant)
        stored = [
            (x / d[:, None, None]).round().clamp(-127, 127) * d[:, None, None]
            for x, d in zip(exact, by, strict=True)
        ]
        is_first = layer_idx >= len(self.layers)
        kept = super().update(*stored, layer_idx)
        return exact if is_first and self.exact_prefill else kept


@torch.no_grad()
def logits(ids, cache):
    """Of a prefill and then token by token, by eager attention over a cache."""
    model = tiny(attention="eager")
    parts = [ids[:PREFILL], *np.split(ids[PREFILL:READ], READ - PREFILL)]
    found = [model(torch.tensor(p)[None], past_key_values=cache).logits[0] for p in parts]
    return torch.cat(found[1:])[:-1].double().log_softmax(-1)


def divergence(ids, cache):
    p, q = logits(ids, DynamicCache()), logits(ids, cache)
    return float((p.exp() * (p - q)).sum(-1).mean()), float(
        (p.argmax(-1) == q.argmax(-1)).double().mean()
    )


@pytest.mark.parametrize("exact", [0, PREFILL])
def test_a_format_scores_what_its_arithmetic_gives_token_by_token(ids, rows, scales, exact):
    given = next(s for cache, s in scales.items() if cache.quant is INT8)
    kl, top1 = divergence(ids, Int8Cache(given, bool(exact)))
    # A value on the edge of two codes may fall on either, and all behind it changes a little.
    assert rows["cache_int8", exact].kl == pytest.approx(kl, rel=0.05)
    assert rows["cache_int8", exact].top1 == pytest.approx(top1, abs=0.05)


def test_the_two_protocols_differ(rows):
    assert rows["cache_int8", PREFILL].kl < 0.9 * rows["cache_int8", 0].kl


def test_a_peer_scores_what_it_does_when_it_decodes_token_by_token(ids, rows):
    kl, top1 = divergence(ids, QuantizedCache("fp8", tiny().config))
    assert rows["fp8", PREFILL].kl == pytest.approx(kl, rel=0.05)
    assert rows["fp8", PREFILL].top1 == pytest.approx(top1, abs=0.05)


def test_none_is_the_models_own_attention(rows, ids):
    for exact in (0, PREFILL):
        assert 0 <= rows["none", exact].kl < 1e-8
        assert rows["none", exact].top1 == 1
    log_p = logits(ids, DynamicCache())
    nll = -log_p[range(len(log_p)), ids[PREFILL + 1 : READ]].mean()
    assert rows["none", 0].perplexity == pytest.approx(float(nll.exp()), rel=1e-4)


def test_bytes_are_those_that_are_held(rows):
    values = 2 * 3 * 2 * 16  # K and V, layers, heads, D
    assert rows["none", 0].bytes_per_token == 4 * values
    assert rows["block_wise_fp8", PREFILL].bytes_per_token == values + 4 * 2 * 3 * 2
    assert rows["fp8", PREFILL].bytes_per_token == values  # and a scale a layer
    int4 = rows["cache_int4_zp", 0]
    assert int4.held_per_token == pytest.approx(
        int4.bytes_per_token + int4.fixed_bytes / READ, 0.01
    )


def test_every_step_is_announced(evaluation, rows, steps):
    done = 1 + -(-(READ - PREFILL) // CHUNK)
    assert [steps.count(name) for name in ("float32", "fp8", "cache_fp8")] == [done, done, 2 * done]
    assert evaluation.steps == len(steps) + 3  # layers that are calibrated


def test_calibrations_stand_side_by_side(folder, ids):
    from fastkv.calibrate.methods import Recipe

    model = HuggingFaceModel(TransformersModel(folder, head=True))
    asked = settings("cache_int4_zp", "none", recipes=(Recipe(), None))
    table = Evaluation(model, ids, asked).run()
    found = [(row.format, row.calibration, row.exact_prefill > 0) for row in table.rows]
    names = ["minmax, headroom 1", "mse, |error|^3 in K, attention weights, headroom 1"]
    want = [("cache_int4_zp", name, exact) for name in names for exact in (False, True)]
    assert found == [*want, ("none", None, False), ("none", None, True)]
    assert len({row.kl for row in table.rows[:4]}) == 4


# What is refused, all of it before a token of the text is read


def refused(path, kind, match, *formats, **options):
    with pytest.raises(kind, match=match):
        Evaluation(
            HuggingFaceModel(TransformersModel(path, head=True)),
            np.zeros(300, np.int64),
            settings(*formats, **options),
        )


@pytest.mark.parametrize("name", ["quanto4-g64", "hqq4-g64"])
def test_a_peer_whose_package_is_missing(folder, name):
    match = f"--peers {name} needs .*, which is not installed: {PEERS[name].install}"
    refused(folder, MissingDependencyError, match, "none", peers=(PEERS[name],))


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"dtype": "bfloat16"}, "--dtype"), ({"backend": "flash"}, "--backend")],
)
def test_an_option_of_the_numpy_decoder(folder, options, argument):
    refused(folder, UnsupportedError, f"fastkv eval: {argument}: expected", "none", **options)


def test_a_head_dim_that_the_format_cannot_pack(tmp_path):
    path = saved(tmp_path, GPT2Config(n_embd=60, n_layer=2, n_head=4, vocab_size=VOCABULARY))
    refused(path, SpecError, "head_dim", "cache_int4_zp")


SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
OTHERS = {
    "tokens that see the future": (
        Gemma3TextConfig(**SMALL, use_bidirectional_attention=True), "expected .*causal|True",
    ),
    "a soft cap in an exact prefill": (Gemma2Config(**SMALL), "without a soft cap or sinks"),
    "no attention": (
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
        "no attention heads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_attention_of_another_kind(tmp_path, name):
    config, match = OTHERS[name]
    refused(saved(tmp_path, config), UnsupportedError, match, "none")


def test_attention_that_gives_something_else(folder, monkeypatch):
    from transformers import AttentionInterface

    from fastkv.integrations.transformers import attention

    def other(module, query, *args, **options):
        out, _ = attention.attend(module, query, *args, **options)
        return out * 1.5, None

    AttentionInterface.register("fastkv", other)
    monkeypatch.setattr("fastkv.integrations.transformers.register", lambda: None)
    try:
        refused(folder, UnsupportedError, r"log-probabilities .* apart", "none")
    finally:
        AttentionInterface.register("fastkv", attention.attend)


# The command


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastkv", "eval", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


@pytest.fixture
def text(tmp_path, ids):
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in ids % (VOCABULARY - 1)))
    return str(path)


def test_the_command_takes_a_folder(monkeypatch, capsys, tmp_path, folder, text):
    rows = tmp_path / "rows.json"
    options = ["--score", "0:60", "--calibrate", "100:200", "--peers", "fp8", "--json", str(rows)]
    assert run(monkeypatch, "--model", folder, "--text", text, *options) == 0
    document = json.loads(rows.read_text())
    assert (document["engine"], document["prefill"], document["chunk"]) == ("transformers", 20, 128)
    assert document["versions"].keys() >= {"numpy", "torch", "transformers"}
    assert len(document["rows"]) == 2 * len(QUANT_SPECS) + 1
    printed = capsys.readouterr().out
    for row in document["rows"]:
        assert f"{row['kl']:.5f}" in printed


def test_an_error_names_the_command_once(monkeypatch, capsys, folder, text):
    options = ["--score", "0:60", "--calibrate", "100:200", "--positions", "900"]
    assert run(monkeypatch, "--model", folder, "--text", text, *options) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        "fastkv eval: --positions: expected the NumPy decoder, got a model of transformers"
    )


def test_more_tokens_than_the_model_has_positions(folder, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("w1 " * 600)
    with pytest.raises(ContractError, match="--score: expected at most 512 tokens, the model's"):
        Source.load(folder, path, {"--score": Span(0, 513)})
