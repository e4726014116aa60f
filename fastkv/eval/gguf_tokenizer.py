# SPDX-License-Identifier: Apache-2.0
"""The tokenizer in a GGUF file: byte-level BPE (GPT-2's family) or SentencePiece BPE (Llama 2)."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.eval.errors import INSTALL, OP, TextError
from fastkv.eval.gguf_llama import ModelFile
from fastkv.optional import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
# How a text is split before its bytes are merged, by the file's tokenizer.ggml.pre: the pattern,
# None for GPT-2's own; and whether every digit stands alone.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "smollm": (None, True),
    "gpt-2": (None, False),
    "default": (None, False),
    "llama-bpe": (_LLAMA3, False),
}
# Values of gguf.TokenType.
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"


class TextTokenizer:
    """Text to the model's token ids.

    Attributes:
        bos: the id that begins every sequence, or None where the model has none.
    """

    def __init__(self, file: ModelFile) -> None:
        self._library = require("tokenizers", OP, INSTALL)
        kind = file.require(_MODEL, "gpt2", "llama")
        self._tokenizer = self._byte_level(file) if kind == "gpt2" else self._sentencepiece(file)
        tokens = file.read("tokenizer.ggml.tokens", list)
        kinds = file.get("tokenizer.ggml.token_type", [])
        special = [t for t, k in zip(tokens, kinds, strict=False) if k in (_CONTROL, _USER_DEFINED)]
        added = [self._library.AddedToken(t, special=True, normalized=False) for t in special]
        self._tokenizer.add_special_tokens(added)
        begins = file.get("tokenizer.ggml.add_bos_token", kind == "llama")
        self.bos: int | None = file.read("tokenizer.ggml.bos_token_id", int) if begins else None

    def encode(self, text: str, name: str) -> "NDArray[np.int64]":
        """Token ids of a text, BOS not among them.

        Args:
            text: the text.
            name: what the error calls it.

        Raises:
            TextError: decoding the ids does not give the text back.
        """
        ids: list[int] = self._tokenizer.encode(text).ids
        if self._tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise TextError(
                OP,
                name,
                expected="a text that the model's tokens spell",
                got="a different one back",
            )
        return np.array(ids, np.int64)

    def decode(self, ids: "list[int]") -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(ids))

    def _byte_level(self, file: ModelFile) -> Any:
        pattern, digits = _SPLITS[file.require(_PRE, *_SPLITS)]
        lib = self._library
        merges = [tuple(m.split(" ", 1)) for m in file.read("tokenizer.ggml.merges", list)]
        vocab = _vocabulary(file)
        # Llama 3 takes a word that is a token as it is, whatever the merges.
        tokenizer = lib.Tokenizer(
            lib.models.BPE(vocab=vocab, merges=merges, ignore_merges=pattern is not None)
        )
        pre = lib.pre_tokenizers
        steps = [pre.Digits(individual_digits=True)] if digits else []
        if pattern is not None:
            steps.append(pre.Split(lib.Regex(pattern), behavior="isolated"))
        steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
        tokenizer.pre_tokenizer = pre.Sequence(steps)
        tokenizer.decoder = lib.decoders.ByteLevel()
        return tokenizer

    def _sentencepiece(self, file: ModelFile) -> Any:
        lib = self._library
        vocab, scores = _vocabulary(file), file.read("tokenizer.ggml.scores", list)
        tokenizer = lib.Tokenizer(
            lib.models.BPE(
                vocab=vocab,
                merges=_merges(vocab, scores),
                unk_token=_unknown(file),
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
        norm, dec = lib.normalizers, lib.decoders
        steps = [norm.Prepend(_SPACE)] if prefix else []
        tokenizer.normalizer = norm.Sequence([*steps, norm.Replace(" ", _SPACE)])
        parts = [dec.Replace(_SPACE, " "), dec.ByteFallback(), dec.Fuse()]
        strip = [dec.Strip(" ", 1, 0)] if prefix else []
        tokenizer.decoder = dec.Sequence([*parts, *strip])
        return tokenizer


def _vocabulary(file: ModelFile) -> dict[str, int]:
    return {token: i for i, token in enumerate(file.read("tokenizer.ggml.tokens", list))}


def _unknown(file: ModelFile) -> str:
    tokens: list[str] = file.read("tokenizer.ggml.tokens", list)
    return tokens[int(file.get("tokenizer.ggml.unknown_token_id", 0))]


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece's merges: every split of a token into two tokens, by the token's score."""
    found = []
    for token, i in vocab.items():
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(-scores[i], pair) for pair in known]
    return [pair for _, pair in sorted(found, key=lambda item: item[0])]
