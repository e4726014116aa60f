# SPDX-License-Identifier: Apache-2.0
"""What was observed and chosen, per layer and head, for tables, JSON and the plot."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.calibrate.observe import Observer
from fastkv.quant import QuantSpec
from fastkv.scales.bundle import StaticScales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]

#: A head whose largest magnitude exceeds this many medians of all heads' is an outlier.
OUTLIER = 3.0


@dataclass(frozen=True, slots=True)
class Outlier:
    """A head that stands out.

    Attributes:
        layer: from 0.
        side: `k` or `v`.
        head: KV head, from 0.
        amax: its largest magnitude.
        ratio: that over the median of all heads of all layers, of the same side.
    """

    layer: int
    side: str
    head: int
    amax: float
    ratio: float

    def __str__(self) -> str:
        return f"layer {self.layer} {self.side.upper()} head {self.head}"


@dataclass(frozen=True)
class Ranges:
    """Of one side, `[layers, Hkv]` each.

    Attributes:
        amax: largest magnitude observed.
        covered: largest magnitude that the codes reach, in the head's widest channel.
    """

    amax: "F32"
    covered: "F32"


def ranges(
    observer: Observer, scales: Mapping[int, StaticScales], row: QuantSpec
) -> dict[str, Ranges]:
    """The ranges of K and V, by `k` and `v`."""
    found = {}
    for index, side in enumerate("kv"):
        amax = [observer.sides(layer)[index].amax.max(axis=-1) for layer in scales]
        covered = [_covered(bundle, side, row) for bundle in scales.values()]
        found[side] = Ranges(np.stack(amax), np.stack(covered))
    return found


def _covered(bundle: StaticScales, side: str, row: QuantSpec) -> "F32":
    assert row.code_min is not None, "a static format has codes"
    assert row.code_max is not None, "a static format has codes"
    dequant, zp = getattr(bundle, f"{side}_dequant"), getattr(bundle, f"{side}_zp")
    ends = [np.abs(code - (0 if zp is None else zp)) for code in (row.code_min, row.code_max)]
    reach: F32 = np.maximum(*ends) * dequant
    return reach if reach.ndim == 1 else reach.max(axis=-1)


def outliers(found: Mapping[str, Ranges]) -> tuple[Outlier, ...]:
    """The heads that stand out, the largest ratio first."""
    named = []
    for side, of in found.items():
        median = float(np.median(of.amax))
        for layer, head in np.argwhere(of.amax > OUTLIER * median).tolist():
            amax = float(of.amax[layer, head])
            named.append(Outlier(layer, side, head, amax, amax / median if median else np.inf))
    return tuple(sorted(named, key=lambda each: -each.ratio))


def as_dict(found: Mapping[str, Ranges]) -> list[dict[str, Any]]:
    """For JSON: one entry a layer."""
    layers = len(next(iter(found.values())).amax)
    return [
        {"layer": layer}
        | {f"{side}_amax": of.amax[layer].tolist() for side, of in found.items()}
        | {f"{side}_covered": of.covered[layer].tolist() for side, of in found.items()}
        for layer in range(layers)
    ]
