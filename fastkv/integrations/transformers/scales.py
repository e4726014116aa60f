# SPDX-License-Identifier: Apache-2.0
"""Static scales from what a model of transformers computes."""

from typing import TYPE_CHECKING

from fastkv.errors import ContractError
from fastkv.quant import Granularity, QuantSpec, QuantType
from fastkv.scales import StaticScales
from fastkv.scales.calibration import calibrate as calibrate_layer

if TYPE_CHECKING:
    from fastkv.integrations.transformers.cache import PagedCache


def calibrate(
    cache: "PagedCache",
    quant: "QuantType | QuantSpec | str",
    *,
    granularity: Granularity | str | None = None,
    headroom: float = 1.0,
) -> dict[int, StaticScales]:
    """Static scales of every layer, from the keys and values that a cache holds.

    Args:
        cache: a `PagedCache` of format `none` that a model has read a text into, without padding.
        quant: a static format.
        granularity: as in `fastkv.scales.calibration.calibrate`.
        headroom: likewise.

    Returns:
        `{layer: StaticScales}`, NumPy arrays, float32, as `PagedCache(scales=…)` takes them.

    Raises:
        ContractError: a cache without tokens; and as `fastkv.scales.calibration.calibrate`.
    """
    if not cache.length:
        raise ContractError(
            "calibrate", "cache", expected="a cache that a model has read a text into", got="none"
        )
    found = {}
    for layer in range(cache.spec.num_layers):
        k, v = (x.transpose(1, 2).flatten(0, 1).cpu() for x in cache.keys_values(layer))
        found[layer] = calibrate_layer(k, v, quant, granularity=granularity, headroom=headroom)
    return found
