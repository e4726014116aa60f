# SPDX-License-Identifier: Apache-2.0
"""The cache formats: one frozen row each.

Nothing else in fastkv asks for a format by name: code reads the row's columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from fastkv.errors import unknown_name


class QuantType(str, Enum):
    """The names of the formats, as the engines spell them."""

    NONE = "none"
    CACHE_INT8 = "cache_int8"
    CACHE_FP8 = "cache_fp8"
    CACHE_INT4_ZP = "cache_int4_zp"
    BLOCK_WISE_FP8 = "block_wise_fp8"

    def __str__(self) -> str:
        return self.value


class ScaleKind(str, Enum):
    """Where the multipliers of a format come from."""

    NONE = "none"  # there are none
    STATIC = "static"  # calibrated ahead, one `StaticScales` a layer
    DYNAMIC = "dynamic"  # computed at each write, paged beside the cache


class Granularity(str, Enum):
    """What shares one static multiplier."""

    HEAD = "head"  # [Hkv]
    CHANNEL = "channel"  # [Hkv, D], or the same flat: [Hkv * D]

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """One format.

    Attributes:
        name: the format's public name.
        storage: dtype of the cache tensors; None stores `CacheSpec.dtype`.
        elements_per_item: K/V elements in one storage item, along D.
        scale: where the multipliers come from.
        granularities: the layouts of the static multipliers, the preferred one first.
        needs_zp: a zero point is required; without it one is refused.
        bound: largest magnitude of a code that calibration maps the observed maximum to.
        code_min: smallest code written; None for `none`.
        code_max: largest code written; None for `none`.
        summary: one line for people.
    """

    name: QuantType
    storage: str | None
    elements_per_item: int
    scale: ScaleKind
    granularities: tuple[Granularity, ...]
    needs_zp: bool
    bound: float | None
    code_min: float | None
    code_max: float | None
    summary: str

    def __reduce__(self) -> tuple[object, ...]:
        # A row is one object, and stays so in the worker process that a spec is sent to.
        return (quant_spec, (self.name.value,))

    @property
    def needs_static(self) -> bool:
        """Whether a layer must carry `StaticScales`."""
        return self.scale is ScaleKind.STATIC

    @property
    def needs_paged_scales(self) -> bool:
        """Whether the cache list holds K scales and V scales behind K and V."""
        return self.scale is ScaleKind.DYNAMIC

    @property
    def tensors_per_layer(self) -> int:
        """Entries of one layer in the engine's flat cache list."""
        return 4 if self.needs_paged_scales else 2

    @property
    def static_fields(self) -> tuple[str, ...]:
        """The fields of `StaticScales` that this format requires."""
        if not self.needs_static:
            return ()
        scales = ("k_quant", "k_dequant", "v_quant", "v_dequant")
        return (*scales, "k_zp", "v_zp") if self.needs_zp else scales


_ROWS = (
    QuantSpec(
        name=QuantType.NONE,
        storage=None,
        elements_per_item=1,
        scale=ScaleKind.NONE,
        granularities=(),
        needs_zp=False,
        bound=None,
        code_min=None,
        code_max=None,
        summary="bf16, fp16 or fp32, as the model computes it",
    ),
    QuantSpec(
        name=QuantType.CACHE_INT8,
        storage="int8",
        elements_per_item=1,
        scale=ScaleKind.STATIC,
        granularities=(Granularity.HEAD, Granularity.CHANNEL),
        needs_zp=False,
        bound=127.0,
        code_min=-127.0,
        code_max=127.0,
        summary="int8, static scale per KV head or per channel",
    ),
    QuantSpec(
        name=QuantType.CACHE_FP8,
        storage="float8_e4m3fn",
        elements_per_item=1,
        scale=ScaleKind.STATIC,
        granularities=(Granularity.HEAD,),
        needs_zp=False,
        bound=448.0,
        code_min=-448.0,
        code_max=448.0,
        summary="e4m3, static scale per KV head",
    ),
    QuantSpec(
        name=QuantType.CACHE_INT4_ZP,
        storage="uint8",
        elements_per_item=2,
        scale=ScaleKind.STATIC,
        granularities=(Granularity.CHANNEL,),
        needs_zp=True,
        bound=7.0,
        code_min=-8.0,
        code_max=7.0,
        summary="int4, two a byte, static scale and zero point per channel",
    ),
    QuantSpec(
        name=QuantType.BLOCK_WISE_FP8,
        storage="float8_e4m3fn",
        elements_per_item=1,
        scale=ScaleKind.DYNAMIC,
        granularities=(),
        needs_zp=False,
        bound=448.0,
        code_min=-448.0,
        code_max=448.0,
        summary="e4m3, dynamic scale per token and KV head, paged beside the cache",
    ),
)

QUANT_SPECS: Mapping[str, QuantSpec] = MappingProxyType({row.name.value: row for row in _ROWS})


def quant_spec(name: object, *, op: str = "quant_spec", argument: str = "name") -> QuantSpec:
    """The row of a format.

    Args:
        name: a `QuantType`, its string, or a row, which is returned as it is.
        op: names the caller in the error.
        argument: names the caller's argument in the error.

    Raises:
        UnknownNameError: with the table's names and the nearest of them.
    """
    if isinstance(name, QuantSpec):
        return name
    row = QUANT_SPECS.get(str(name)) if isinstance(name, str) else None
    if row is None:
        raise unknown_name(op, argument, name, QUANT_SPECS)
    return row
