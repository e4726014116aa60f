# SPDX-License-Identifier: Apache-2.0
"""Static scales from K and V themselves.

The range of what was seen, times a headroom, goes through `StaticScales.from_amax` or
`from_minmax`. One thing is more than the range: where the format has zero points, those of V are
integers and its range contains 0, so that a V of 0 reads back as 0. Models park attention on a
sink token whose V is nearly 0 (Xiao et al., arXiv:2309.17453); with a zero point between two codes
that V comes back as up to half a step, and the sink's large weight puts it into every output.
`docs/eval.md` has the measurement.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv import arrays
from fastkv.errors import ScaleError, ShapeError, UnsupportedError
from fastkv.quant import Granularity, QuantSpec, QuantType, quant_spec
from fastkv.scales.bundle import StaticScales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]

_OP = "calibrate"


def calibrate(
    k: Any,
    v: Any,
    quant: "QuantType | QuantSpec | str",
    *,
    granularity: Granularity | str | None = None,
    headroom: float = 1.0,
) -> StaticScales:
    """Static scales of one layer from its K and V over a calibration text.

    Args:
        k: K after norm and RoPE, `[n, Hkv, D]`, bf16, fp16 or fp32, on the CPU, any library.
        v: V, as `k`.
        quant: a static format.
        granularity: layout of the multipliers; None takes the format's preferred one.
        headroom: widens each range: of a symmetric format about 0, of one with zero points about
            the middle. More saturates less and rounds coarser.

    Returns:
        A bundle of NumPy arrays, float32.

    Raises:
        UnsupportedError: a format without static scales.
        ScaleError: a granularity that the format does not have, a headroom that is not finite and
            positive, or values that are not finite.
        ShapeError: not `[n, Hkv, D]` with n at least 1.
    """
    row = quant_spec(quant, op=_OP, argument="quant")
    layout = _layout(row, granularity)
    if not 0 < headroom < np.inf:
        raise _fault(row, "headroom", "finite and > 0", repr(headroom))
    k_range, v_range = _range("k", k, row), _range("v", v, row)
    if row.needs_zp:
        return _asymmetric(k_range, v_range, row, headroom)
    k_amax, v_amax = _amax(k_range, layout, headroom), _amax(v_range, layout, headroom)
    return StaticScales.from_amax(k_amax, v_amax, row.name)


def _layout(row: QuantSpec, granularity: Granularity | str | None) -> Granularity:
    if not row.needs_static:
        raise UnsupportedError(
            _OP,
            "quant",
            format=row.name.value,
            expected="a format with static scales",
            got=row.name.value,
        )
    wanted = row.granularities[0] if granularity is None else granularity
    for layout in row.granularities:
        if layout == wanted:
            return layout
    known = " or ".join(layout.value for layout in row.granularities)
    raise _fault(row, "granularity", known, repr(str(wanted)))


def _amax(x: "tuple[F32, F32]", layout: Granularity, headroom: float) -> "F32":
    amax: F32 = np.maximum(np.abs(x[0]), np.abs(x[1])) * np.float32(headroom)
    return amax.max(axis=-1) if layout is Granularity.HEAD else amax


def _asymmetric(
    k: "tuple[F32, F32]", v: "tuple[F32, F32]", row: QuantSpec, headroom: float
) -> StaticScales:
    around_zero = np.minimum(v[0], 0), np.maximum(v[1], 0)
    found = StaticScales.from_minmax(
        *_widen(*k, headroom), *_widen(*around_zero, headroom), row.name
    )
    return replace(found, v_zp=np.rint(found.v_zp))


def _widen(low: "F32", high: "F32", headroom: float) -> "tuple[F32, F32]":
    more = (high - low) * np.float32((headroom - 1) / 2)
    return low - more, high + more


def _range(name: str, x: Any, row: QuantSpec) -> "tuple[F32, F32]":
    """Smallest and largest value of each channel, `[Hkv, D]`."""
    values = np.asarray(arrays.to_host(x)).astype(np.float32, copy=False)
    if values.ndim != 3 or not len(values):
        raise ShapeError(
            _OP, name, format=row.name.value, expected="[n, Hkv, D]", got=str(list(values.shape))
        )
    low, high = values.min(axis=0), values.max(axis=0)
    if not (np.isfinite(low) & np.isfinite(high)).all():
        raise _fault(row, name, "finite values", "NaN or inf")
    return low, high


def _fault(row: QuantSpec, argument: str, expected: str, got: str) -> ScaleError:
    return ScaleError(_OP, argument, format=row.name.value, expected=expected, got=got)
