# SPDX-License-Identifier: Apache-2.0
"""What is measured, and how: the protocol that all rows of a run share."""

from collections.abc import Iterator
from dataclasses import dataclass

from fastkv.calibrate.methods import Recipe, recommended
from fastkv.errors import ContractError
from fastkv.eval.errors import OP
from fastkv.eval.subject import WINDOW, FormatCache, Peer, Subject
from fastkv.eval.text import Span
from fastkv.quant import Granularity, QuantSpec

EXACT_DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, and how.

    Attributes:
        formats: the formats.
        score: tokens that the model reads; scored are those behind the prefill.
        calibrate: tokens that static scales are calibrated on.
        backend: which backend attends.
        granularities: layouts of static multipliers, for formats with a choice; without one that
            a format has it is the format's preferred one.
        positions: calibrate K at all positions below this, see `observe_llama`.
        recipes: how static scales come from what was observed; None is the best measured for the
            format.
        dtype: what `none` stores.
        chunk: tokens of a step.
        peers: caches of transformers to hold the formats against.
        prefill: tokens that are read in one step ahead of the others and not scored. Each format
            then has two rows: with everything quantized, and with a prefill that attends to its
            K and V as they come, which is what the peers do.

    Raises:
        ContractError: a prefill that leaves nothing to score, peers without one, or a step that
            the peers' window is no multiple of.
    """

    formats: tuple[QuantSpec, ...]
    score: Span
    calibrate: Span
    backend: str = "append"
    granularities: tuple[Granularity, ...] = ()
    positions: int | None = None
    recipes: tuple[Recipe | None, ...] = (Recipe(),)
    dtype: str = EXACT_DTYPE
    chunk: int = 256
    peers: tuple[Peer, ...] = ()
    prefill: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.prefill < len(self.score) - 1:
            expected = f"0 to {len(self.score) - 2}, of the {len(self.score)} tokens that are read"
            raise ContractError(OP, "--prefill", expected=expected, got=str(self.prefill))
        if self.peers and not self.prefill:
            expected = "at least 1: the first tokens are exact in a QuantizedCache"
            raise ContractError(OP, "--prefill", expected=expected, got="0")
        # A step of a divisor leaves in the window what decoding token by token leaves there.
        if self.peers and WINDOW % self.chunk:
            expected = f"a divisor of {WINDOW}, the peers' window"
            raise ContractError(OP, "--chunk", expected=expected, got=str(self.chunk))

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """The caches under test, each once, in the order of the rows."""
        formats = (cache for quant in self.formats for cache in self._of(quant))
        return tuple(dict.fromkeys((*formats, *self.peers)))

    def _of(self, quant: QuantSpec) -> Iterator[FormatCache]:
        prefills = (False, True) if self.prefill else (False,)
        for layout in self._layouts(quant):
            for recipe in self.recipes if quant.needs_static else (None,):
                used = recipe
                if quant.needs_static and used is None:
                    assert layout is not None, "static formats have a layout"
                    used = recommended(quant, layout)
                for exact in prefills:
                    yield FormatCache(quant, layout, used, exact)

    def _layouts(self, quant: QuantSpec) -> tuple[Granularity | None, ...]:
        asked = tuple(g for g in self.granularities if g in quant.granularities)
        return asked or quant.granularities[:1] or (None,)

    @property
    def scored(self) -> Span:
        """Tokens whose prediction is scored, the first of them aside."""
        return Span(self.score.start + self.prefill, self.score.stop)
