# SPDX-License-Identifier: Apache-2.0
"""The table of `fastkv eval`: every format over the same text, in lockstep with a float32 cache."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.calibrate.gguf import observe_llama
from fastkv.calibrate.methods import Recipe
from fastkv.calibrate.observe import Observer
from fastkv.eval.gguf_llama import Llama
from fastkv.eval.score import Score
from fastkv.eval.serve import Session, eval_spec
from fastkv.eval.text import Span
from fastkv.quant import Granularity, QuantSpec
from fastkv.scales import StaticScales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

_EXACT_DTYPE = "float32"

#: Scales of each layer, by format.
ScalesByFormat = Mapping[QuantSpec, Mapping[int, StaticScales]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, and how.

    Attributes:
        formats: the formats.
        score: tokens that are scored.
        calibrate: tokens that static scales are calibrated on.
        backend: which backend attends.
        granularity: layout of static multipliers, for formats with a choice; None takes each
            format's preferred one.
        positions: calibrate K at all positions below this, see `observe_llama`.
        recipe: how static scales come from what was observed.
        dtype: what `none` stores.
        chunk: tokens of a step.
    """

    formats: tuple[QuantSpec, ...]
    score: Span
    calibrate: Span
    backend: str = "append"
    granularity: Granularity | None = None
    positions: int | None = None
    recipe: Recipe = Recipe()  # noqa: RUF009 - frozen
    dtype: str = _EXACT_DTYPE
    chunk: int = 256

    def layout(self, quant: QuantSpec) -> Granularity | None:
        """Layout of a format's static multipliers; None where it has none."""
        if self.granularity in quant.granularities:
            return self.granularity
        return quant.granularities[0] if quant.granularities else None

    def is_exact(self, quant: QuantSpec) -> bool:
        """Whether a format's cache is the float32 one that all are compared with."""
        return quant.bound is None and self.dtype == _EXACT_DTYPE


@dataclass(frozen=True, slots=True)
class Row:
    """One format.

    Attributes:
        format: its name.
        dtype: what the cache stores.
        granularity: layout of the static multipliers; None without.
        kl: mean KL divergence a token from the model over a float32 cache, in nats.
        perplexity: of the scored tokens.
        top1: share of tokens whose most likely successor is the float32 cache's.
        bytes_per_token: K, V and paged scales, all layers.
        fixed_bytes: static multipliers and zero points, all layers, whatever the tokens.
        tokens_per_s: scored tokens a second, in the whole decoder on the reference ops.
    """

    format: str
    dtype: str
    granularity: str | None
    kl: float
    perplexity: float
    top1: float
    bytes_per_token: int
    fixed_bytes: int
    tokens_per_s: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured: the float32 cache's perplexity, and a row a format."""

    perplexity: float
    rows: tuple[Row, ...]


class Evaluation:
    """A model over a text, in several formats.

    Args:
        model: the weights.
        ids: the text's tokens.
        settings: what to measure.
        bos: begins the sequence, where the model has such a token.
    """

    def __init__(
        self, model: Llama, ids: "Ids", settings: Settings, bos: int | None = None
    ) -> None:
        self.model = model
        self.settings = settings
        self._bos = bos
        self._scored = self._sequence(ids, settings.score)
        self._calibrated = self._sequence(ids, settings.calibrate)

    def _sequence(self, ids: "Ids", span: Span) -> "Ids":
        first = [] if self._bos is None else [self._bos]
        return np.concatenate([np.array(first, np.int64), ids[span.slice]])

    @property
    def calibrates(self) -> bool:
        """Whether a format needs static scales."""
        return any(quant.needs_static for quant in self.settings.formats)

    @property
    def steps(self) -> int:
        """How often `run` calls `done`."""
        sessions = 1 + sum(not self.settings.is_exact(quant) for quant in self.settings.formats)
        calibration = self.model.num_layers if self.calibrates else 0
        return calibration + sessions * len(self._chunks(self._scored))

    def run(self, done: Callable[[str], None] = lambda _: None) -> Table:
        """Calibrate, then score every format; `done` is told of each step what comes next."""
        scales = self.calibrated(done) if self.calibrates else {}
        return self.scored(scales, done)

    def calibrated(self, done: Callable[[str], None] = lambda _: None) -> ScalesByFormat:
        """Static scales from K (after RoPE) and V of the calibration text, one sequence."""
        recipe = self.settings.recipe
        observer = Observer(self.model.num_layers, recipe.by_attention, lambda _: done("calibrate"))
        positions = self.settings.positions
        observe_llama(self.model, [self._calibrated], observer, positions=positions)
        found = {}
        for quant in self.settings.formats:
            if not quant.needs_static:
                continue
            found[quant] = observer.scales(quant, self.settings.layout(quant), recipe)
            for layer, scales in found[quant].items():
                scales.validate(eval_spec(self.model, quant.name), layer)
        return found

    def scored(self, scales: ScalesByFormat, done: Callable[[str], None] = lambda _: None) -> Table:
        """Score every format with given scales."""
        exact = _Run(self._session(None, {}))
        runs = {
            quant: exact
            if self.settings.is_exact(quant)
            else _Run(self._session(quant, scales.get(quant, {})))
            for quant in self.settings.formats
        }
        for chunk in self._chunks(self._scored):
            ids, targets = self._scored[chunk], self._scored[chunk.start + 1 : chunk.stop + 1]
            expected = exact.step(ids)
            exact.score.add(expected, expected, targets)
            done("float32")
            for quant, run in runs.items():
                if run is not exact:
                    run.score.add(expected, run.step(ids), targets)
                    done(quant.name.value)
        rows = tuple(self._row(quant, run) for quant, run in runs.items())
        return Table(exact.score.perplexity, rows)

    def _chunks(self, sequence: "Ids") -> list[slice]:
        size = self.settings.chunk
        return [slice(i, min(i + size, len(sequence))) for i in range(0, len(sequence), size)]

    def _session(self, quant: QuantSpec | None, scales: Mapping[int, StaticScales]) -> Session:
        """A session of a format, None the float32 cache, with room for either text."""
        capacity = max(len(self._scored), len(self._calibrated))
        if quant is None:
            spec = eval_spec(self.model, "none", _EXACT_DTYPE)
        else:
            spec = eval_spec(self.model, quant.name, self.settings.dtype)
        return Session(self.model, spec, scales, capacity, self.settings.backend)

    def _row(self, quant: QuantSpec, run: "_Run") -> Row:
        spec, layout = run.session.spec, self.settings.layout(quant)
        return Row(
            format=quant.name.value,
            dtype=spec.storage_dtype(0),
            granularity=None if layout is None else layout.value,
            kl=run.score.mean_kl,
            perplexity=run.score.perplexity,
            top1=run.score.top1,
            bytes_per_token=int(spec.bytes_per_token()),
            fixed_bytes=spec.static_bytes(layout if quant.needs_static else None),
            tokens_per_s=run.session.cached / run.seconds,
        )


class _Run:
    """A session, its score, and the seconds it took."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.score = Score()
        self.seconds = 0.0

    def step(self, ids: "Ids") -> "NDArray[Any]":
        """The logits of the next tokens."""
        start = perf_counter()
        logits = self.session.logits(ids)
        self.seconds += perf_counter() - start
        return logits
