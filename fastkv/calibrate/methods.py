# SPDX-License-Identifier: Apache-2.0
"""From what was observed to the range that the codes cover: one function a method."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from fastkv.calibrate.histogram import Histogram
from fastkv.calibrate.search import search
from fastkv.errors import ContractError, unknown_name
from fastkv.quant import Granularity, QuantSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastkv.scales.calibration import Range

    F64 = NDArray[np.float64]

_OP = "calibration"
# Halvings of a range: far below a bin's width.
_HALVINGS = 40


@dataclass(frozen=True, slots=True)
class Side:
    """What was observed of K or of V in one layer.

    Attributes:
        name: `k` or `v`.
        low: smallest value of each channel, `[Hkv, D]` float32.
        high: largest.
        histogram: of the Hkv * D channels, weighted as the recipe says.
    """

    name: str
    low: "NDArray[np.float32]"
    high: "NDArray[np.float32]"
    histogram: Histogram

    @property
    def amax(self) -> "NDArray[np.float32]":
        """Largest magnitude of each channel, `[Hkv, D]`."""
        found: NDArray[np.float32] = np.maximum(np.abs(self.low), np.abs(self.high))
        return found


@dataclass(frozen=True, slots=True)
class Recipe:
    """How ranges come from what was observed.

    Attributes:
        method: one of `METHODS`.
        headroom: widens the ranges, see `fastkv.scales.calibration.calibrate`.
        percentile: per cent of the mass that `percentile` covers.
        weights: one of `WEIGHTS`, of each token in the histograms; `minmax` does not read them.
        k_power: `mse` minimizes the mean of |error|^k_power in K; of V always the square.

    Raises:
        UnknownNameError: of a method or of weights.
        ContractError: a headroom, a percentile or a power that is none.
    """

    method: str = "minmax"
    headroom: float = 1.0
    percentile: float = 99.9
    weights: str = "uniform"
    k_power: int = 2

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name(_OP, "--method", self.method, METHODS)
        if self.weights not in WEIGHTS:
            raise unknown_name(_OP, "--weights", self.weights, WEIGHTS)
        self._require("headroom", "finite and > 0", 0 < self.headroom < float("inf"))
        self._require("percentile", "above 50, at most 100", 50 < self.percentile <= 100)
        self._require("k_power", "1 to 8", 1 <= self.k_power <= 8)

    def _require(self, name: str, expected: str, is_so: bool) -> None:
        if not is_so:
            option = f"--{name.replace('_', '-')}"
            raise ContractError(_OP, option, expected=expected, got=repr(getattr(self, name)))

    def describe(self) -> str:
        """In words."""
        parts = [self.method]
        if self.method == "percentile":
            parts[0] += f" {self.percentile:g}"
        if self.method == "mse" and self.k_power != 2:
            parts.append(f"|error|^{self.k_power} in K")
        if self.method != "minmax":
            parts.append(f"{self.weights} weights")
        return ", ".join([*parts, f"headroom {self.headroom:g}"])

    @property
    def by_attention(self) -> bool:
        """Whether the histograms' weights come from the model's attention."""
        return self.weights == "attention"

    def range(self, side: Side, row: QuantSpec, layout: Granularity) -> "Range":
        """The range of each channel, `[Hkv, D]` each, without the headroom."""
        return METHODS[self.method](side, row, layout, self)


def _minmax(side: Side, row: QuantSpec, layout: Granularity, recipe: Recipe) -> "Range":
    return side.low, side.high


def _mse(side: Side, row: QuantSpec, layout: Granularity, recipe: Recipe) -> "Range":
    # V enters the output linearly; K through exp, where a large error does more than its square.
    power = recipe.k_power if side.name == "k" else 2
    seen = side.low, side.high
    return search(side.name, side.histogram, seen, row, layout, power)


def _percentile(side: Side, row: QuantSpec, layout: Granularity, recipe: Recipe) -> "Range":
    """Of magnitudes, a head's together, or of values, half of the rest cut off at either end."""
    share = recipe.percentile / 100
    if row.needs_zp:
        rest = (1 - share) / 2
        return _quantile(side, rest), _quantile(side, 1 - rest)
    found = magnitude_quantile(side, share, layout)
    return -found, found


def _quantile(side: Side, share: float) -> "NDArray[np.float32]":
    """The value that a share of each channel's mass lies below, `[Hkv, D]`."""
    low, high = (x.reshape(-1).astype(np.float64) for x in (side.low, side.high))
    total = side.histogram.mass.sum(axis=1)
    found = _bisect(low, high, lambda x: side.histogram.below(x) >= share * total)
    return found.reshape(side.low.shape).astype(np.float32)


def magnitude_quantile(side: Side, share: float, layout: Granularity) -> "NDArray[np.float32]":
    """The magnitude that a share of a channel's or head's mass does not exceed, `[Hkv, D]`."""
    shape, per_head = side.amax.shape, layout is Granularity.HEAD

    def pooled(x: "F64", of: "Callable[..., F64]") -> "F64":
        wide = x.reshape(shape)
        return np.broadcast_to(of(wide, axis=-1, keepdims=True), shape) if per_head else wide

    total = pooled(side.histogram.mass.sum(axis=1), np.sum)

    def covered(x: "F64") -> "NDArray[np.bool_]":
        flat = x.reshape(-1)
        inside = side.histogram.below(flat) - side.histogram.below(-flat)
        return pooled(inside, np.sum) >= share * total

    amax = pooled(side.amax.astype(np.float64), np.max)
    return _bisect(np.zeros(shape), amax, covered).astype(np.float32)


def _bisect(low: "F64", high: "F64", reached: "Callable[[F64], NDArray[np.bool_]]") -> "F64":
    """Between low and high, the smallest values that are reached; high where none is."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        yes = reached(middle)
        low, high = np.where(yes, low, middle), np.where(yes, middle, high)
    return high


#: What weighs a token in the histograms: all alike, or by how far its errors reach the output.
WEIGHTS = ("uniform", "attention")

METHODS: Mapping[str, Callable[[Side, QuantSpec, Granularity, Recipe], "Range"]] = MappingProxyType(
    {"minmax": _minmax, "percentile": _percentile, "mse": _mse}
)


def recommended(row: QuantSpec, layout: Granularity) -> Recipe:
    """The best measured, for formats like this; `docs/calibrate.md` has the table."""
    if row.needs_zp:
        return Recipe("mse", weights="attention", k_power=3)
    # A channel's maximum over a text is exceeded often, a head's hardly ever.
    return Recipe("minmax", headroom=1.5 if layout is Granularity.CHANNEL else 1.0)
