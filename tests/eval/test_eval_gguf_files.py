# SPDX-License-Identifier: Apache-2.0
"""GGUF files written on the fly: what is read, what is refused by name, and the whole command."""

import json
import sys
from itertools import pairwise

import gguf
import numpy as np
import pytest

from fastkv.cli import main
from fastkv.errors import MissingDependencyError
from fastkv.eval.errors import ModelFileError, TextError
from fastkv.eval.gguf_llama import ModelFile
from fastkv.eval.gguf_tokenizer import TextTokenizer
from helpers import plain_llama

TEXT = "The café sold 42 eggs; “fine”, they said.\n\n" * 60
# GPT-2's names of the 256 bytes: printable ones stand for themselves, the others from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTES = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
MERGES = ["h e", "Ġ t", "Ġt he", "e g", "Ġ eg", "4 2", "s a", "i d", "sa id"]


def byte_tokens():
    merged = [merge.replace(" ", "") for merge in MERGES]
    return ["<|end|>", *BYTES.values(), *merged]


NORMAL, CONTROL, BYTE = 1, 3, 6
VOCABULARY = len(byte_tokens())


@pytest.fixture
def model():
    return plain_llama.random_llama(np.random.default_rng(31), vocabulary=VOCABULARY)


@pytest.fixture
def write(tmp_path):
    """Write a model as GGUF; None removes a key or a tensor, other values replace them."""

    def to_file(model, *, keys=None, tensors=None, architecture="llama", matrices=None):
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        metadata = {
            "llama.block_count": model.num_layers,
            "llama.embedding_length": model.weights["token_embd.weight"].shape[1],
            "llama.feed_forward_length": model.weights["blk.0.ffn_up.weight"].shape[0],
            "llama.attention.head_count": model.num_q_heads,
            "llama.attention.head_count_kv": model.num_kv_heads,
            "llama.attention.key_length": model.head_dim,
            "llama.attention.value_length": model.head_dim,
            "llama.rope.dimension_count": model.rotary_dim,
            "llama.rope.freq_base": model.theta,
            "llama.attention.layer_norm_rms_epsilon": model.eps,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": byte_tokens(),
            "tokenizer.ggml.token_type": [CONTROL] + [NORMAL] * (VOCABULARY - 1),
            "tokenizer.ggml.merges": MERGES,
            **(keys or {}),
        }
        for key, value in metadata.items():
            add(writer, key, value)
        for name, value in {**model.weights, **(tensors or {})}.items():
            if value is None:
                continue
            if matrices is not None and value.ndim == 2:
                writer.add_tensor(name, gguf.quantize(value, matrices), raw_dtype=matrices)
            else:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return to_file


def add(writer, key, value):
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        kinds[type(value)](key, value)


# The model


def test_the_model_is_the_one_that_was_written(write, model):
    read = ModelFile(write(model)).llama()
    assert read.weights.keys() == model.weights.keys()
    for name, value in model.weights.items():
        assert np.array_equal(read.weights[name], value), name
        assert read.weights[name].dtype == np.float32
    for field in ("num_layers", "num_q_heads", "num_kv_heads", "head_dim", "rotary_dim"):
        assert getattr(read, field) == getattr(model, field)
    assert read.theta == model.theta
    assert read.eps == pytest.approx(model.eps, rel=1e-6)
    assert read.position_scale == 1
    assert read.output is read.weights["token_embd.weight"]


def test_quantized_weights_are_dequantized(write):
    model = plain_llama.random_llama(
        np.random.default_rng(32), vocabulary=VOCABULARY, hidden=64, ffn=96, heads=(4, 2)
    )
    read = ModelFile(write(model, matrices=gguf.GGMLQuantizationType.Q8_0)).llama()
    for name, value in model.weights.items():
        off = np.abs(read.weights[name] - value).max() / np.abs(value).max()
        assert off < 0.005, name
        assert (off > 0) == (value.ndim == 2), name


def test_optional_tensors_and_keys_are_read(write):
    model = plain_llama.random_llama(
        np.random.default_rng(33), vocabulary=VOCABULARY, tied=False, frequencies=True, rotary=8
    )
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    read = ModelFile(write(model, keys=keys)).llama()
    assert read.position_scale == 4
    assert read.rotary_dim == 8
    assert np.array_equal(read.output, model.weights["output.weight"])
    assert np.array_equal(read.weights["rope_freqs.weight"], model.weights["rope_freqs.weight"])


def test_keys_that_older_files_lack_have_their_defaults(write):
    model = plain_llama.random_llama(
        np.random.default_rng(34), vocabulary=VOCABULARY, heads=(3, 3), dim=16, hidden=48
    )
    names = ("attention.key_length", "attention.value_length", "attention.head_count_kv")
    absent = [*names, "rope.dimension_count", "rope.freq_base"]
    read = ModelFile(write(model, keys={f"llama.{name}": None for name in absent})).llama()
    assert (read.head_dim, read.num_kv_heads, read.rotary_dim, read.theta) == (16, 3, 16, 10_000)


WRONG = {
    "no layers": ({"llama.block_count": None}, {}, "llama.block_count: expected an integer"),
    "heads as a list": (
        {"llama.attention.head_count_kv": [2, 2, 2]},
        {},
        r"llama\.attention\.head_count_kv: expected an integer of at least 1, got \[2, 2, 2\]",
    ),
    "heads that do not divide": (
        {"llama.attention.head_count_kv": 4},
        {},
        "llama.attention.head_count_kv: expected a divisor of the 6 heads, got 4",
    ),
    "no epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": None},
        {},
        r"llama\.attention\.layer_norm_rms_epsilon: expected a value, got no such key",
    ),
    "experts": ({"llama.expert_count": 8}, {}, "llama.expert_count: expected 0"),
    "yarn": (
        {"llama.rope.scaling.type": "yarn"},
        {},
        "llama.rope.scaling.type: expected none or linear, got 'yarn'",
    ),
    "other value length": (
        {"llama.attention.value_length": 8},
        {},
        "llama.attention.value_length: expected 16, as of keys, got 8",
    ),
    "odd rotary": (
        {"llama.rope.dimension_count": 7},
        {},
        "llama.rope.dimension_count: expected an even number, at most 16, got 7",
    ),
    "a bias": (
        {},
        {"blk.0.attn_q.bias": np.ones(96, np.float32)},
        "blk.0.attn_q.bias: expected the tensors of a plain Llama",
    ),
    "a tensor missing": (
        {},
        {"blk.2.ffn_up.weight": None},
        r"blk\.2\.ffn_up\.weight: expected shape \[40, 48\], got no such tensor",
    ),
    "another shape": (
        {},
        {"blk.1.attn_k.weight": np.ones((16, 48), np.float32)},
        r"blk\.1\.attn_k\.weight: expected shape \[32, 48\], got \(16, 48\)",
    ),
}


@pytest.mark.parametrize(("keys", "tensors", "says"), WRONG.values(), ids=WRONG)
def test_what_the_decoder_does_not_compute_is_refused_by_name(write, model, keys, tensors, says):
    path = write(model, keys=keys, tensors=tensors)
    with pytest.raises(ModelFileError, match=rf"tiny\.gguf: {says}"):
        ModelFile(path).llama()


def test_another_architecture_is_refused_before_anything_else_is_read(write, model):
    path = write(model, architecture="qwen2")
    says = r"tiny\.gguf: general\.architecture: expected 'llama', got 'qwen2'"
    with pytest.raises(ModelFileError, match=says):
        ModelFile(path)


@pytest.mark.parametrize("kept", [0, 3, 40, 2000, -1000])
def test_a_broken_file_is_named(write, model, kept):
    path = write(model)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelFileError, match=r"tiny\.gguf: the file: expected GGUF"):
        ModelFile(path)


def test_a_file_that_is_no_gguf_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("{}" * 100)
    with pytest.raises(ModelFileError, match=r"rows\.json: the file: expected GGUF"):
        ModelFile(path)


# The tokenizer


def naive_merge(pieces, rank):
    """Byte-pair merging as it is defined: the best pair first, the leftmost of equals."""
    while True:
        pairs = [(rank[p], i) for i, p in enumerate(pairwise(pieces)) if p in rank]
        if not pairs:
            return pieces
        at = min(pairs)[1]
        pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]


def test_byte_level_tokens_are_those_of_the_merges(write, model):
    tokenizer = TextTokenizer(ModelFile(write(model)))
    rank = {tuple(merge.split()): i for i, merge in enumerate(MERGES)}
    words = ["the", " the", " egg", " said", " ", "4", "2", " “fine”"]  # digits stand alone
    pieces = []
    for word in words:
        pieces += naive_merge([BYTES[b] for b in word.encode()], rank)
    ids = tokenizer.encode("".join(words), "t.txt")
    assert [byte_tokens()[i] for i in ids] == pieces
    assert {"Ġthe", "said"} <= set(pieces)
    assert tokenizer.bos is None
    assert tokenizer.decode(ids.tolist()) == "".join(words)


def test_digits_stay_together_where_the_file_says_so(write, model):
    path = write(model, keys={"tokenizer.ggml.pre": "llama-bpe"})
    ids = TextTokenizer(ModelFile(path)).encode("42", "t.txt")
    assert [byte_tokens()[i] for i in ids] == ["42"]


PIECES = {"▁": -1.0, "a": -9.0, "b": -9.0, "▁a": -2.0, "ab": -1.5, "aba": -3.0, "▁ab": -4.0}
PIECES |= {"é": -9.0, "bb": -2.5}


def sentencepiece_keys(**more):
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *PIECES]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(PIECES.values()),
        "tokenizer.ggml.token_type": [2, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("words", ["a ab abba", "aba  b é aab", "ab\n\nba Ω"])
def test_sentencepiece_tokens_are_those_of_the_scores(write, model, words, prefix):
    keys = sentencepiece_keys(**{"tokenizer.ggml.add_space_prefix": prefix})
    tokenizer = TextTokenizer(ModelFile(write(model, keys=keys)))
    rank = {
        (piece[:cut], piece[cut:]): -score
        for piece, score in PIECES.items()
        for cut in range(1, len(piece))
    }
    rank = {pair: r for pair, r in rank.items() if set(pair) <= PIECES.keys()}
    pieces = naive_merge(list(("▁" if prefix else "") + words.replace(" ", "▁")), rank)
    spelled = []
    for piece in pieces:
        known = [piece] if piece in PIECES else [f"<0x{b:02X}>" for b in piece.encode()]
        spelled += known
    ids = tokenizer.encode(words, "t.txt")
    assert [keys["tokenizer.ggml.tokens"][i] for i in ids] == spelled
    assert tokenizer.bos == 1  # sequences of these models begin with it


def test_a_file_may_say_that_nothing_begins_a_sequence(write, model):
    keys = sentencepiece_keys(**{"tokenizer.ggml.add_bos_token": False})
    assert TextTokenizer(ModelFile(write(model, keys=keys))).bos is None


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model: expected 'gpt2' or 'llama'"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre: expected 'smollm' or .*'tekken'"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges: expected a value"),
        (sentencepiece_keys(**{"tokenizer.ggml.scores": None}), "scores: expected a value"),
        ({"tokenizer.ggml.add_bos_token": True}, "bos_token_id: expected a value"),
    ],
    ids=["model", "pre", "merges", "scores", "bos"],
)
def test_a_tokenizer_that_is_not_known_is_refused_by_key(write, model, keys, says):
    path = write(model, keys=keys)
    with pytest.raises(ModelFileError, match=rf"tiny\.gguf: .*{says}"):
        TextTokenizer(ModelFile(path))


def test_a_text_that_the_tokens_cannot_spell_is_refused(write, model):
    # Without byte tokens a letter outside the vocabulary is lost.
    tokens = [t for t in byte_tokens() if t != "z"]
    tokenizer = TextTokenizer(
        ModelFile(write(model, keys={"tokenizer.ggml.tokens": [*tokens, "<filler>"]}))
    )
    with pytest.raises(TextError, match=r"zoo\.txt: expected a text that the model's tokens spell"):
        tokenizer.encode("a zoo", "zoo.txt")


def test_without_tokenizers_the_error_is_the_line_that_installs_it(monkeypatch, write, model):
    file = ModelFile(write(model))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r"needs tokenizers.*'fastkv\[eval\]'"):
        TextTokenizer(file)


# The command


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastkv", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


def test_any_llama_and_any_text_are_evaluated(monkeypatch, capsys, tmp_path, write, model):
    path, story, picture = write(model), tmp_path / "story.txt", tmp_path / "kl.png"
    story.write_text(TEXT, encoding="utf-8")
    options = ("--score", "0:200", "--calibrate", "300:700", "--json", "-", "--plot", picture)
    assert run(monkeypatch, "--model", path, "--text", story, *options) == 0
    document = json.loads(capsys.readouterr().out)
    rows = {row["format"]: row for row in document["rows"]}
    assert document["model"] == "tiny.gguf"
    assert document["text"] == "story.txt"
    assert rows["none"]["kl"] == 0
    assert 0 < rows["cache_int8"]["kl"] < rows["cache_int4_zp"]["kl"]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert picture.stat().st_size > 10_000

    tokenizer = TextTokenizer(ModelFile(path))
    ids = tokenizer.encode("\n\n".join(TEXT.split("\n\n")[:60]), "story.txt")[:200]
    logits = plain_llama.logits(model, ids)[:-1]
    log_p = logits - np.log(np.exp(logits - logits.max()).sum(-1, keepdims=True)) - logits.max()
    want = np.exp(-log_p[np.arange(199), ids[1:]].mean())
    assert rows["none"]["perplexity"] == pytest.approx(want, rel=1e-5)


def test_a_text_too_short_is_named_and_exits_with_2(monkeypatch, capsys, tmp_path, write, model):
    path, story = write(model), tmp_path / "story.txt"
    story.write_text("the egg", encoding="utf-8")
    arguments = ("--model", path, "--text", story, "--formats", "none", "--score", "0:9")
    assert run(monkeypatch, *arguments) == 2
    assert "--score 0:9 of story.txt: expected 9 tokens, got 4" in capsys.readouterr().err


def test_calibration_tokens_are_asked_for_only_where_they_are_used(
    monkeypatch, capsys, tmp_path, write, model
):
    path, story = write(model), tmp_path / "story.txt"
    story.write_text("the egg", encoding="utf-8")
    shared = ("--model", path, "--text", story, "--score", "0:4")
    assert run(monkeypatch, *shared, "--formats", "none,block_wise_fp8", "--json", "-") == 0
    capsys.readouterr()
    assert run(monkeypatch, *shared, "--formats", "cache_int8") == 2
    assert "--calibrate 20000:22048 of story.txt" in capsys.readouterr().err
