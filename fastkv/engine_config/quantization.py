# SPDX-License-Identifier: Apache-2.0
"""Which format the KV-cache quantization of a config asks for."""

from fastkv.engine_config.section import Section
from fastkv.errors import unknown_name
from fastkv.quant import Granularity, QuantType, quant_spec

_SECTIONS = ("quantization_config", "compression_config")

# FastDeploy's `kv_cache_quant_type`: the format, and whether its scales are per channel there.
_FASTDEPLOY = {
    "int8": (QuantType.CACHE_INT8, True),
    "float8_e4m3fn": (QuantType.CACHE_FP8, False),
    "int4_zp": (QuantType.CACHE_INT4_ZP, True),
    "block_wise_fp8": (QuantType.BLOCK_WISE_FP8, False),
}
_FASTDEPLOY_REFUSED = ("int8_zp", "float8_e4m3fn_zp")
# compressed-tensors' `kv_cache_scheme` (vLLM, ModelOpt): type and bits.
_SCHEMES = {("float", 8): QuantType.CACHE_FP8, ("int", 8): QuantType.CACHE_INT8}
_SCHEME_STRATEGIES = ("tensor", "attn_head")


def configured_format(top: Section, text: Section) -> tuple[QuantType, Granularity | None]:
    """The format that the config asks for, and the granularity of its static multipliers."""
    places = ((where, key) for where in (top, text) for key in _SECTIONS)
    section = next(filter(None, (where.section(key) for where, key in places)), None)
    if section is None:
        return QuantType.NONE, None
    readers = {"kv_cache_quant_type": _fastdeploy, "kv_cache_scheme": _compressed_tensors}
    asked = [
        key
        for key, value in section.values.items()
        if key.startswith("kv_cache") and value is not None and value is not False
    ]
    for key in asked:
        if key not in readers:
            raise section.refused(key, f"{' or '.join(readers)} instead")
    if len(asked) > 1:
        raise section.wrong(asked[1], f"nothing beside {asked[0]}")
    return readers[asked[0]](section) if asked else (QuantType.NONE, None)


def _fastdeploy(section: Section) -> tuple[QuantType, Granularity | None]:
    key = "kv_cache_quant_type"
    name = section.values[key]
    if name in _FASTDEPLOY_REFUSED:
        raise section.refused(key, f"one of {', '.join(_FASTDEPLOY)}")
    if not isinstance(name, str) or name not in _FASTDEPLOY:
        raise unknown_name(section.source, section.prefix + key, name, _FASTDEPLOY)
    quant, per_channel = _FASTDEPLOY[name]
    row = quant_spec(quant)
    if section.boolean("has_zero_point") and not row.needs_zp:
        raise section.refused("has_zero_point", "false", quant)
    if not row.needs_static:
        return quant, None
    if not per_channel and not section.boolean("is_channel_wise"):
        return quant, row.granularities[0]
    if Granularity.CHANNEL not in row.granularities:
        raise section.refused("is_channel_wise", "false", quant)
    return quant, Granularity.CHANNEL


def _compressed_tensors(section: Section) -> tuple[QuantType, Granularity | None]:
    scheme = section.section("kv_cache_scheme")
    assert scheme is not None, "the caller found a value"
    values = scheme.values
    kind = (values.get("type"), values.get("num_bits"))
    if kind not in tuple(_SCHEMES):  # a value may be unhashable
        known = " or ".join(f"type {name}, num_bits {bits}" for name, bits in _SCHEMES)
        raise section.refused("kv_cache_scheme", known)
    if values.get("strategy") not in (None, *_SCHEME_STRATEGIES):
        raise scheme.refused("strategy", " or ".join(_SCHEME_STRATEGIES))
    if values.get("symmetric") not in (None, True):
        raise scheme.refused("symmetric", "true")
    if values.get("dynamic"):
        raise scheme.refused("dynamic", "false: static scales")
    return _SCHEMES[kind], Granularity.HEAD
