# SPDX-License-Identifier: Apache-2.0
"""Static scales from K and V themselves.

The range of what was seen, times a headroom, goes through the formulas of `StaticScales.from_amax`
or `from_minmax`. One thing is more than the range: where the format has zero points, those of V are
integers and its range contains 0, so that a V of 0 reads back as 0. Models park attention on a
sink token whose V is nearly 0 (Xiao et al., arXiv:2309.17453); with a zero point between two codes
that V comes back as up to half a step, and the sink's large weight puts it into every output.
`docs/eval.md` has the measurement.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv import arrays
from fastkv.errors import ScaleError, ShapeError, UnsupportedError
from fastkv.quant import Granularity, QuantSpec, QuantType, quant_spec
from fastkv.scales.bundle import StaticScales
from fastkv.scales.formulas import asymmetric, symmetric

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]
    #: Lowest and highest value of each channel, `[Hkv, D]` each.
    Range = tuple[F32, F32]

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
    layout = static_layout(row, granularity)
    ranges = _range("k", k, row), _range("v", v, row)
    return from_ranges(*ranges, row, layout, headroom)


def from_ranges(
    k: "Range", v: "Range", row: QuantSpec, layout: Granularity, headroom: float = 1.0
) -> StaticScales:
    """Static scales of one layer from the ranges that its codes are to cover.

    Args:
        k: lowest and highest K of each channel, `[Hkv, D]` each, float32.
        v: of V, as `k`.
        row: a static format.
        layout: one of its granularities.
        headroom: see `calibrate`.

    Raises:
        ScaleError: a headroom that is not finite and positive, a range that is none.
    """
    if not 0 < headroom < np.inf:
        raise _fault(row, "headroom", "finite and > 0", repr(headroom))
    k_quant, k_dequant, k_zp = side_scales("k", k, row, layout, headroom)
    v_quant, v_dequant, v_zp = side_scales("v", v, row, layout, headroom)
    return StaticScales(k_quant, k_dequant, v_quant, v_dequant, k_zp, v_zp)


def side_scales(
    side: str, within: "Range", row: QuantSpec, layout: Granularity, headroom: float = 1.0
) -> "tuple[F32, F32, F32 | None]":
    """Quant and dequant multipliers, and zero points or None, of one side: `k` or `v`."""
    low, high = within
    if not row.needs_zp:
        amax = np.maximum(np.abs(low), np.abs(high)) * np.float32(headroom)
        return *symmetric(amax.max(axis=-1) if layout is Granularity.HEAD else amax, row), None
    if side == "v":
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    quant, dequant, zp = asymmetric(*_widen(low, high, headroom), row)
    return quant, dequant, np.rint(zp) if side == "v" else zp


def static_layout(
    row: QuantSpec,
    granularity: Granularity | str | None,
    *,
    op: str = _OP,
    argument: str = "granularity",
) -> Granularity:
    """The layout of a static format's multipliers; None takes the preferred one.

    Raises:
        UnsupportedError: a format without static scales.
        ScaleError: a granularity that the format does not have.
    """
    if not row.needs_static:
        raise UnsupportedError(
            op,
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
    got = repr(str(wanted))
    raise ScaleError(op, argument, format=row.name.value, expected=known, got=got)


def _widen(low: "F32", high: "F32", headroom: float) -> "Range":
    more = (high - low) * np.float32((headroom - 1) / 2)
    return low - more, high + more


def _range(name: str, x: Any, row: QuantSpec) -> "Range":
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
