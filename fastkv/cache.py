# SPDX-License-Identifier: Apache-2.0
"""One layer's part of the KV cache."""

from dataclasses import dataclass
from typing import Any

from fastkv.flat import Flat
from fastkv.quant import QuantSpec
from fastkv.scales import StaticScales
from fastkv.spec import CacheSpec


@dataclass(frozen=True, slots=True)
class LayerCache(Flat):
    """The tensors of one layer, as an op takes them.

    `fastkv.backends.resolve` makes it from an engine's flat list; nothing here looks inside a
    tensor. The ops check presence, shape and dtype before they run.

    Attributes:
        spec: the cache this layer belongs to.
        layer_id: index of the layer within `spec`.
        k: `[N, Hkv, P, D_storage]` in the format's storage dtype (or its bytes as uint8).
        v: as `k`.
        k_scale: `[N, Hkv, P]` in `spec.scale_dtype`, dequant multipliers; dynamic formats only.
        v_scale: as `k_scale`.
        static: multipliers and zero points of a static format, else None.
    """

    spec: CacheSpec
    layer_id: int
    k: Any
    v: Any
    k_scale: Any = None
    v_scale: Any = None
    static: StaticScales | None = None

    @property
    def quant(self) -> QuantSpec:
        """The format of this layer."""
        return self.spec.layer_quant(self.layer_id)
