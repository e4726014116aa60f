# SPDX-License-Identifier: Apache-2.0
"""What the default model must reach on the default text; `docs/eval.md` derives the numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fastkv.calibrate.methods import Recipe
from fastkv.eval.measure import Table
from fastkv.eval.settings import Settings
from fastkv.eval.subject import FormatCache, Subject
from fastkv.eval.text import Span
from fastkv.quant import QuantType

#: The tokens that static scales come from, for all bounds.
CALIBRATION = Span(20_000, 22_048)

#: How far the perplexity over a float32 cache may be off, relative: sums in another order move it
#: by less than 1e-5, a wrong decoder by far more.
PERPLEXITY_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Bounds:
    """For one range of scored tokens.

    Attributes:
        perplexity: over the float32 cache.
        max_kl: by format.
    """

    perplexity: float
    max_kl: Mapping[str, float]


def _kl(int8: float, fp8: float, int4: float, block_wise: float) -> Mapping[str, float]:
    values = {
        QuantType.NONE: 0.0,
        QuantType.CACHE_INT8: int8,
        QuantType.CACHE_FP8: fp8,
        QuantType.CACHE_INT4_ZP: int4,
        QuantType.BLOCK_WISE_FP8: block_wise,
    }
    return MappingProxyType({name.value: bound for name, bound in values.items()})


#: By the tokens that are scored.
BOUNDS: Mapping[Span, Bounds] = MappingProxyType(
    {
        Span(0, 3072): Bounds(21.067, _kl(int8=0.0025, fp8=0.011, int4=0.11, block_wise=0.0055)),
        Span(0, 256): Bounds(30.668, _kl(int8=0.0036, fp8=0.0087, int4=0.136, block_wise=0.0063)),
    }
)


def bounds_for(settings: Settings) -> Bounds | None:
    """The bounds of the default model and text under these settings, None where there are none."""
    as_documented = (
        settings.calibrate == CALIBRATION
        and settings.backend == "append"
        and settings.dtype == "float32"
        and settings.recipes == (Recipe(),)
        and settings.positions is None
        and not settings.prefill
        and all(_is_preferred(subject) for subject in settings.subjects)
    )
    return BOUNDS.get(settings.score) if as_documented else None


def _is_preferred(subject: Subject) -> bool:
    if not isinstance(subject, FormatCache):
        return False
    return subject.layout in (*subject.quant.granularities[:1], None)


def missed(table: Table, bounds: Bounds) -> list[str]:
    """What a table misses, in words; a NaN misses."""
    found = []
    if not abs(table.perplexity / bounds.perplexity - 1) <= PERPLEXITY_TOLERANCE:
        found.append(f"perplexity over float32: {table.perplexity:.3f}, not {bounds.perplexity}")
    for row in table.rows:
        bound = bounds.max_kl.get(row.format)
        if bound is not None and not row.kl <= bound:
            found.append(f"{row.format}: KL {row.kl:.5f} > {bound}")
    return found
