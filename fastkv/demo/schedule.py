# SPDX-License-Identifier: Apache-2.0
"""What an engine would do with four requests: which tokens of which request in which step."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fastkv.demo.sample import Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_SIZE = 16
_CHUNK = 64  # tokens of a prefill chunk
_DECODED = 24  # tokens of each request that are decoded
_TOKENS_A_DECODE_STEP = (1, 1, 3, 1, 2)  # plain decode, and steps with draft tokens
_SHARES = (0.4, 0.28, 0.2, 0.12)  # of the sample, one a request
_ARRIVAL = 2  # steps between two requests


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        tokens: rows of the sample, in order; position i holds `tokens[i]`.
        steps: `(first step, how many new tokens in each step from there on)`.
        prefill_steps: how many of these are prefill, from the first.
    """

    tokens: "NDArray[np.int64]"
    first_step: int
    steps: tuple[int, ...]
    prefill_steps: int

    def new_tokens(self, step: int) -> int:
        """Tokens of this request in a step; 0 before it arrives and after it ends."""
        at = step - self.first_step
        return self.steps[at] if 0 <= at < len(self.steps) else 0

    def decodes(self, step: int) -> bool:
        """Whether a step is decode (or over) for this request."""
        return step - self.first_step >= self.prefill_steps

    def exact_from(self) -> "NDArray[np.int64]":
        """First key that each row meets unquantized in a backend that gathers.

        A prefill row meets the keys of its own chunk as they come, every other one meets none so.
        """
        ends = np.cumsum(self.steps)
        chunk = np.searchsorted(ends, np.arange(len(self.tokens)), side="right")
        starts = np.concatenate([[0], ends])[chunk]
        return np.where(chunk < self.prefill_steps, starts, len(self.tokens))


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: requests in batch order (decode first), tokens before and now."""

    order: tuple[int, ...]
    cached: tuple[int, ...]
    new: tuple[int, ...]
    num_decode: int


def requests(sample: Sample) -> tuple[Request, ...]:
    """Four requests over the sample's tokens.

    Each begins with the text's first token, which the model uses as an attention sink, and goes
    on with a stretch of its own, so that no two hold the same keys.
    """
    bounds = np.floor(np.cumsum([0, *_SHARES]) * (sample.num_tokens - 1)).astype(int) + 1
    made = []
    for i, (start, stop) in enumerate(pairwise(bounds)):
        tokens = np.concatenate([[0], np.arange(start, stop)])
        chunks = _split(len(tokens) - _DECODED, (_CHUNK,))
        decode = _split(_DECODED, _TOKENS_A_DECODE_STEP)
        made.append(Request(tokens, i * _ARRIVAL, chunks + decode, len(chunks)))
    return tuple(made)


def _split(total: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """`total` in parts of the given sizes, over and over; the last part may be smaller."""
    parts: list[int] = []
    while sum(parts) < total:
        parts.append(min(sizes[len(parts) % len(sizes)], total - sum(parts)))
    return tuple(parts)


def steps(of: tuple[Request, ...]) -> Iterator[Step]:
    """All steps; requests that have not come or have ended stay in the batch, empty."""
    for step in range(max(r.first_step + len(r.steps) for r in of)):
        order = sorted(range(len(of)), key=lambda i: not of[i].decodes(step))
        yield Step(
            order=tuple(order),
            cached=tuple(sum(of[i].new_tokens(s) for s in range(step)) for i in order),
            new=tuple(of[i].new_tokens(step) for i in order),
            num_decode=sum(r.decodes(step) for r in of),
        )
