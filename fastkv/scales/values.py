# SPDX-License-Identifier: Apache-2.0
"""What `StaticScales.validate` and the reference ops check in the values of a bundle."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv import arrays
from fastkv.contracts.tensors import check_static
from fastkv.errors import ScaleError
from fastkv.quant import QuantSpec
from fastkv.scales.bundle import FIELDS, StaticScales

if TYPE_CHECKING:
    from fastkv.spec import CacheSpec

# A pair within this of inverse is rounding (bfloat16 keeps 2 to 3 digits); past it, a mistake.
_INVERSE_TOLERANCE = 0.02


def require_usable(op: str, static: StaticScales, spec: "CacheSpec", quant: QuantSpec) -> None:
    """Raise unless shapes and dtypes fit the format and every value can be used."""
    check_static(op, static, spec, quant)
    require_values(op, "static", static.map(_host), quant)


def require_values(op: str, argument: str, static: StaticScales, quant: QuantSpec) -> None:
    """Raise unless multipliers are finite and positive and zero points finite (NumPy arrays)."""
    for name in FIELDS:
        array = getattr(static, name)
        if array is None:
            continue
        values = np.asarray(array, np.float32)
        is_zp = name.endswith("_zp")
        usable = np.isfinite(values) if is_zp else np.isfinite(values) & (values > 0)
        if not usable.all():
            worst = tuple(int(i) for i in np.argwhere(~usable)[0])
            raise ScaleError(
                op,
                f"{argument}.{name}{list(worst)}",
                format=quant.name.value,
                expected="finite" if is_zp else "finite and > 0",
                got=str(values[worst]),
                hint="A scale of 0 is one that was created and never filled."
                if not is_zp and values[worst] == 0
                else "",
            )


def remarks(static: StaticScales) -> tuple[str, ...]:
    """Remarks on legal values that look like a mistake."""
    found = []
    for side in ("k", "v"):
        quant, dequant = (
            _host(getattr(static, f"{side}_quant")),
            _host(getattr(static, f"{side}_dequant")),
        )
        product = quant.reshape(-1) * dequant.reshape(-1) if quant.size == dequant.size else None
        if product is None:
            found.append(f"{side}_quant and {side}_dequant have different granularities")
        elif (off := np.abs(product - 1)).max() > _INVERSE_TOLERANCE:
            found.append(
                f"{side}_quant x {side}_dequant is {product[off.argmax()]:.4g} at {off.argmax()}: "
                "the pair is not inverse within 2 %"
            )
    scales = [_host(getattr(static, name)) for name in FIELDS[:4]]
    if all((values == 1.0).all() for values in scales):
        found.append("every multiplier is 1.0: were the scales calibrated?")
    return tuple(found)


def _host(array: Any) -> Any:
    return np.asarray(arrays.to_host(array), np.float32)
