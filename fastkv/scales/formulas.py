# SPDX-License-Identifier: Apache-2.0
"""From observed ranges to multipliers and zero points.

Symmetric formats map the largest magnitude on the format's bound, FastDeploy's way:
`quant = bound / amax`, `dequant = amax / bound`. A format with zero points maps `[min, max]` on
its codes: `step = (max - min) / (code_max - code_min)`, `zp = code_min - min / step`, so that min
meets code_min and max meets code_max. The range need not contain 0: the zero point is a float.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv import arrays
from fastkv.errors import ScaleError, UnsupportedError
from fastkv.quant import Granularity, QuantSpec, quant_spec
from fastkv.scales.bundle import StaticScales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]

# A channel that calibration never saw move would get an infinite multiplier; this range maps
# whatever appears there later on saturated codes of a tiny step instead.
_SMALLEST_RANGE = np.float32(2.0**-14)
# A narrow range far from 0 gets a zero point of range / step codes; beyond this, x * quant and zp
# would cancel most of float32's digits.
_SMALLEST_RELATIVE = np.float32(2.0**-10)


def from_amax(k_amax: Any, v_amax: Any, quant: object) -> StaticScales:
    """See `StaticScales.from_amax`."""
    row = _static_row("StaticScales.from_amax", quant)
    if row.needs_zp:
        raise UnsupportedError(
            "StaticScales.from_amax",
            "quant",
            format=row.name.value,
            expected="a static format without zero points",
            got=row.name.value,
            hint="Use StaticScales.from_minmax.",
        )
    return StaticScales(*symmetric(k_amax, row), *symmetric(v_amax, row))


def from_minmax(k_min: Any, k_max: Any, v_min: Any, v_max: Any, quant: object) -> StaticScales:
    """See `StaticScales.from_minmax`."""
    row = _static_row("StaticScales.from_minmax", quant)
    if not row.needs_zp:
        return from_amax(_amax(k_min, k_max, row), _amax(v_min, v_max, row), quant)
    k_quant, k_dequant, k_zp = asymmetric(k_min, k_max, row)
    v_quant, v_dequant, v_zp = asymmetric(v_min, v_max, row)
    return StaticScales(k_quant, k_dequant, v_quant, v_dequant, k_zp, v_zp)


def _static_row(op: str, quant: object) -> QuantSpec:
    row = quant_spec(quant, op=op, argument="quant")
    if not row.needs_static:
        raise UnsupportedError(
            op,
            "quant",
            format=row.name.value,
            expected="a format with static scales",
            got=row.name.value,
        )
    return row


def _amax(low: Any, high: Any, row: QuantSpec) -> "F32":
    amax = np.maximum(*map(np.abs, _range(low, high)))
    return amax.max(axis=-1) if row.granularities[0] is Granularity.HEAD else amax


def symmetric(amax: Any, row: QuantSpec) -> "tuple[F32, F32]":
    """Quant and dequant multipliers of one side from its largest magnitudes."""
    assert row.bound is not None, "a static format has a bound"
    observed = _float32(amax)
    _require("from_amax", "amax", np.isfinite(observed) & (observed >= 0), "finite and >= 0")
    if observed.ndim == 2 and Granularity.CHANNEL not in row.granularities:
        observed = observed.max(axis=-1)
    top = np.maximum(observed, _SMALLEST_RANGE)
    bound = np.float32(row.bound)
    return _float32(bound / top), _float32(top / bound)


def asymmetric(low: Any, high: Any, row: QuantSpec) -> "tuple[F32, F32, F32]":
    """Quant and dequant multipliers and zero points of one side from its ranges."""
    assert row.code_min is not None, "a format with zero points has codes"
    assert row.code_max is not None, "a format with zero points has codes"
    bottom, top = _range(low, high)
    levels = np.float32(row.code_max - row.code_min)
    smallest = np.maximum(_SMALLEST_RANGE, _SMALLEST_RELATIVE * np.maximum(-bottom, top))
    step: F32 = np.maximum(top - bottom, smallest) / levels
    zp: F32 = np.float32(row.code_min) - bottom / step
    quant: F32 = np.asarray(1 / step, np.float32)
    return quant, step, zp


def _range(low: Any, high: Any) -> "tuple[F32, F32]":
    bottom, top = _float32(low), _float32(high)
    usable = np.isfinite(bottom) & np.isfinite(top) & (bottom <= top)
    _require("from_minmax", "min, max", usable, "finite, min <= max")
    return bottom, top


def _require(function: str, argument: str, usable: "NDArray[np.bool_]", expected: str) -> None:
    if not usable.all():
        where = np.argwhere(~usable)[0].tolist()
        raise ScaleError(
            f"StaticScales.{function}",
            argument,
            expected=expected,
            got=f"others, first at {where}",
            hint="An observer that saw no token?",
        )


def _float32(array: Any) -> "F32":
    return np.asarray(arrays.to_host(array), np.float32)
