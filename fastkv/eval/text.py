# SPDX-License-Identifier: Apache-2.0
"""The text that is scored, and the ranges of its tokens."""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fastkv.eval.errors import OP, TextError

#: The text that ships with fastkv; `fastkv/data/README.md` says where it comes from.
DEFAULT_TEXT = "alice29.txt"


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start:stop` of the text."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop - 1:
            raise TextError(OP, "a range of tokens", expected=_RANGE, got=str(self))

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        """To index token ids with."""
        return slice(self.start, self.stop)

    @classmethod
    def parse(cls, text: str, argument: str) -> "Span":
        """`a:b`; raises `TextError` naming the argument for anything else."""
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None or not 0 <= int(match[1]) < int(match[2]) - 1:
            raise TextError(OP, argument, expected=_RANGE, got=repr(text))
        return cls(int(match[1]), int(match[2]))


_RANGE = "start:stop with at least two tokens, 0:3072 say"


def paragraphs(raw: str) -> str:
    """Paragraphs on one line each, whitespace collapsed, a blank line between them."""
    parts = re.split(r"\n\s*\n", raw)
    return "\n\n".join(" ".join(p.split()) for p in parts if p.strip())


def read_text(path: Path | None) -> tuple[str, str]:
    """The text as `paragraphs` leaves it, and its name; None takes the one that ships."""
    if path is None:
        return paragraphs((files("fastkv.data") / DEFAULT_TEXT).read_text("utf-8")), DEFAULT_TEXT
    if not path.is_file():
        raise TextError(OP, "--text", expected="a text file", got=f"no file {path}")
    try:
        return paragraphs(path.read_text(encoding="utf-8")), path.name  # CRLF becomes LF here
    except UnicodeDecodeError as error:
        raise TextError(OP, f"--text {path.name}", expected="UTF-8", got=str(error)) from error


def require_tokens(count: int, span: Span, argument: str, name: str) -> None:
    """Raise `TextError` where a text of `count` tokens ends before a range does."""
    if count < span.stop:
        raise TextError(
            OP, f"{argument} {span} of {name}", expected=f"{span.stop} tokens", got=str(count)
        )
