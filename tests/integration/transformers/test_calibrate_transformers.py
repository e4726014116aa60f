# SPDX-License-Identifier: Apache-2.0
"""What the adapter observes, against transformers' own cache of the same tokens."""

from inspect import signature

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from fastkv.calibrate.methods import Recipe
from fastkv.calibrate.observe import Observer
from fastkv.calibrate.source import load
from fastkv.errors import ContractError, UnsupportedError
from fastkv.eval.errors import TextError
from fastkv.quant import QUANT_SPECS

# Renamed in transformers 5.24.
CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"
WORDS = {f"w{i}": i for i in range(90)} | {"?": 90}


def saved(model, folder):
    """A model and a tokenizer of 90 words."""
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture
def llama():
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=91,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaModel(config).eval()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    ids = np.random.default_rng().integers(0, 90, 100)
    path.write_text(" ".join(f"w{i}" for i in ids))
    return path, ids


def test_k_and_v_are_those_of_the_models_own_cache(llama, text, tmp_path):
    path, ids = text
    source = load(str(saved(llama, tmp_path / "llama")), path, None, 60)
    assert [s.tolist() for s in source.sequences] == [ids[:60].tolist(), ids[60:].tolist()]
    observer = Observer(source.num_layers, by_attention=True)
    source.run(observer)
    kept = []
    for sequence in source.sequences:
        cache = DynamicCache()
        with torch.no_grad():
            llama(input_ids=torch.tensor(sequence)[None], use_cache=True, **{CACHE: cache})
        kept.append(cache)
    for layer in range(3):
        for side, name in zip(observer.sides(layer), ("keys", "values"), strict=True):
            x = torch.cat([getattr(c.layers[layer], name)[0] for c in kept], dim=1).numpy()
            np.testing.assert_allclose(side.low, x.min(axis=1), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(side.high, x.max(axis=1), rtol=1e-4, atol=1e-5)
    scales = observer.scales(QUANT_SPECS["cache_int4_zp"], None, Recipe("mse"))
    assert sorted(scales) == [0, 1, 2]


def test_what_cannot_be_calibrated_is_refused(llama, text, tmp_path):
    path, _ = text
    folder = str(saved(llama, tmp_path / "llama"))
    with pytest.raises(ContractError, match="--window: expected at most 64"):
        load(folder, path, None, 65)
    short = tmp_path / "short.txt"
    short.write_text("w1")
    with pytest.raises(TextError, match=r"short\.txt: expected at least two tokens, got 1"):
        load(folder, short, None, 60)
    with pytest.raises(TextError, match=r"--tokens 0:101 of words.txt: expected 101 tokens"):
        load(folder, path, "0:101", 60)
    with pytest.raises(ContractError, match="--model: expected a GGUF file or a transformers"):
        load(str(tmp_path / "nothing"), path, None, 60)
    weights = tmp_path / "llama" / "model.safetensors"
    tensors = load_file(weights)
    tensors["layers.1.self_attn.k_proj.weight"] = torch.ones(8, 32)
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ContractError, match="--model: expected a GGUF file or a transformers"):
        load(folder, path, None, 60)
    del tensors["layers.1.self_attn.k_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ContractError, match=r"none of layers\.1\.self_attn\.k_proj\.weight in"):
        load(folder, path, None, 60)
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ContractError, match=r"--model: expected .* got Error while deserializing"):
        load(folder, path, None, 60)
    bert = BertModel(
        BertConfig(
            vocab_size=91,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    source = load(str(saved(bert, tmp_path / "bert")), path, None, 60)
    with pytest.raises(UnsupportedError, match=r"causal attention.*got BertSelfAttention"):
        source.run(Observer(1))


def test_the_first_token_that_the_tokenizer_adds_counts_for_the_longest_sequence(
    llama, text, tmp_path
):
    path, ids = text
    folder = saved(llama, tmp_path / "llama")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, bos_token="w0")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="w0 $A", special_tokens=[("w0", 0)]
    )
    tokenizer.save_pretrained(folder)
    source = load(str(folder), path, None, 63)
    assert [s.tolist() for s in source.sequences] == [[0, *ids[:63]], [0, *ids[63:]]]
    with pytest.raises(ContractError, match="--window: expected at most 63"):
        load(str(folder), path, None, 64)
