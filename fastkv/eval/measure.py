# SPDX-License-Identifier: Apache-2.0
"""The table of `fastkv eval`: every cache over the same text, in lockstep with a float32 one."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.calibrate.methods import Recipe
from fastkv.calibrate.observe import Observer
from fastkv.eval.model import Model, Session
from fastkv.eval.score import Score
from fastkv.eval.settings import EXACT_DTYPE, Settings
from fastkv.eval.subject import FormatCache, Subject
from fastkv.eval.text import Span
from fastkv.quant import Granularity
from fastkv.scales import StaticScales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

#: Scales of each layer, by the cache that is calibrated.
ScalesOf = Mapping[FormatCache, Mapping[int, StaticScales]]


@dataclass(frozen=True, slots=True)
class Row:
    """One cache.

    Attributes:
        format: its name, or the peer's.
        dtype: what the cache stores.
        granularity: layout of the static multipliers; None without.
        kl: mean KL divergence a token from the model over a float32 cache, in nats.
        perplexity: of the scored tokens.
        top1: share of tokens whose most likely successor is the float32 cache's.
        bytes_per_token: K, V and paged scales, all layers.
        fixed_bytes: static multipliers and zero points, all layers, whatever the tokens.
        tokens_per_s: tokens a second, in the whole model on the reference ops.
        calibration: how the static scales were found; None without.
        exact_prefill: first tokens that attended to each other's K and V as they came.
        window: newest tokens that are kept in full precision until there are so many.
        held_per_token: bytes a token of all that is kept at the end of the text, static scales
            and a full window among them.
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
    calibration: str | None = None
    exact_prefill: int = 0
    window: int = 0
    held_per_token: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured: the float32 cache's perplexity, and a row a cache."""

    perplexity: float
    rows: tuple[Row, ...]


class Evaluation:
    """A model over a text, with several caches.

    Args:
        model: the model.
        ids: the text's tokens.
        settings: what to measure.
        bos: begins the sequence, where the model has such a token.

    Raises:
        ContractError, SelectionError: a cache that the model cannot be tested with.
        MissingDependencyError: what a cache needs is not installed.
    """

    def __init__(
        self, model: Model, ids: "Ids", settings: Settings, bos: int | None = None
    ) -> None:
        self.model = model
        self.settings = settings
        self.subjects = settings.subjects
        self._bos = bos
        self._scored = self._sequence(ids, settings.score)
        self._calibrated = self._sequence(ids, settings.calibrate)
        model.check(self.subjects, settings.dtype, settings.backend)

    def _sequence(self, ids: "Ids", span: Span) -> "Ids":
        first = [] if self._bos is None else [self._bos]
        return np.concatenate([np.array(first, np.int64), ids[span.slice]])

    def is_exact(self, subject: Subject) -> bool:
        """Whether a cache is the float32 one that all are compared with."""
        return (
            self.model.none_is_exact
            and isinstance(subject, FormatCache)
            and subject.quant.bound is None
            and self.settings.dtype == EXACT_DTYPE
        )

    @property
    def _static(self) -> "dict[FormatCache, list[FormatCache]]":
        """Caches by what calibrates them: with and without an exact prefill it is the same."""
        found: dict[FormatCache, list[FormatCache]] = {}
        for subject in self.subjects:
            if isinstance(subject, FormatCache) and subject.recipe is not None:
                found.setdefault(replace(subject, exact_prefill=False), []).append(subject)
        return found

    @property
    def _weights(self) -> list[bool]:
        """Which kinds of weights the recipes want, by attention or not; one pass each."""
        return sorted({cache.recipe.by_attention for cache in self._static if cache.recipe})

    @property
    def steps(self) -> int:
        """How often `run` calls `done`."""
        sessions = 1 + sum(not self.is_exact(subject) for subject in self.subjects)
        calibration = self.model.num_layers * len(self._weights)
        return calibration + sessions * len(self._chunks())

    def run(self, done: Callable[[str], None] = lambda _: None) -> Table:
        """Calibrate, then score every cache; `done` is told of each step what comes next."""
        return self.scored(self.calibrated(done), done)

    def calibrated(self, done: Callable[[str], None] = lambda _: None) -> ScalesOf:
        """Static scales from K (after RoPE) and V of the calibration text, one sequence."""
        found = {}
        for by_attention in self._weights:
            observer = Observer(self.model.num_layers, by_attention, lambda _: done("calibrate"))
            self.model.observe(self._calibrated, observer, self.settings.positions)
            for cache, subjects in self._static.items():
                recipe = cache.recipe
                if recipe is None or recipe.by_attention != by_attention:
                    continue
                scales = observer.scales(cache.quant, cache.layout, recipe)
                for layer, bundle in scales.items():
                    bundle.validate(self.model.spec(cache, self.settings.dtype), layer)
                found.update(dict.fromkeys(subjects, scales))
        return found

    def scored(self, scales: ScalesOf, done: Callable[[str], None] = lambda _: None) -> Table:
        """Score every cache with given scales."""
        exact = _Run(self.model.exact(len(self._scored)))
        runs = {
            subject: exact if self.is_exact(subject) else _Run(self._session(subject, scales))
            for subject in self.subjects
        }
        others = [(subject, run) for subject, run in runs.items() if run is not exact]
        for chunk in self._chunks():
            ids, targets = self._scored[chunk], self._scored[chunk.start + 1 : chunk.stop + 1]
            expected = exact.step(ids, chunk.start < self.settings.prefill)
            if expected is not None:
                exact.score.add(expected, expected, targets)
            done("float32")
            for subject, run in others:
                logits = run.step(ids, expected is None)
                if logits is not None and expected is not None:
                    run.score.add(expected, logits, targets)
                done(subject.name)
        dense = exact.session.size().bytes_per_token
        rows = tuple(self._row(subject, run, dense) for subject, run in runs.items())
        return Table(exact.score.perplexity, rows)

    def _chunks(self) -> list[slice]:
        size, first, stop = self.settings.chunk, self.settings.prefill, len(self._scored)
        steps = [slice(i, min(i + size, stop)) for i in range(first, stop, size)]
        return [slice(0, first), *steps] if first else steps

    def _session(self, subject: Subject, scales: ScalesOf) -> Session:
        given = scales.get(subject, {}) if isinstance(subject, FormatCache) else {}
        settings, capacity = self.settings, len(self._scored)
        return self.model.open(
            subject, given, capacity, dtype=settings.dtype, backend=settings.backend
        )

    def _row(self, subject: Subject, run: "_Run", dense: float) -> Row:
        size, window, fixed = run.session.size(), 0, 0
        layout: Granularity | None = None
        recipe: Recipe | None = None
        exact_prefill = True
        if isinstance(subject, FormatCache):
            layout, recipe = subject.layout, subject.recipe
            exact_prefill = subject.exact_prefill
            fixed = self.model.spec(subject, self.settings.dtype).static_bytes(layout)
        else:
            window = subject.window
        # One less than the window: with the last token everything in it is quantized.
        held_exactly, tokens = max(0, window - 1), len(self._scored)
        per_token = size.bytes_per_token
        beside = held_exactly * (dense - per_token) + fixed
        return Row(
            format=subject.name,
            dtype=size.dtype,
            granularity=None if layout is None else layout.value,
            kl=run.score.mean_kl,
            perplexity=run.score.perplexity,
            top1=run.score.top1,
            bytes_per_token=round(per_token),
            fixed_bytes=fixed,
            tokens_per_s=tokens / run.seconds,
            calibration=None if recipe is None else recipe.describe(),
            exact_prefill=self.settings.prefill if exact_prefill else 0,
            window=window,
            held_per_token=round(per_token + beside / tokens, 1),
        )


class _Run:
    """A session, its score, and the seconds it took."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.score = Score()
        self.seconds = 0.0

    def step(self, ids: "Ids", is_prefill: bool) -> "NDArray[Any] | None":
        """The logits of the next tokens; None for the prefill's."""
        start = perf_counter()
        logits = None
        if is_prefill:
            self.session.fill(ids)
        else:
            logits = self.session.logits(ids)
        self.seconds += perf_counter() - start
        return logits
