# SPDX-License-Identifier: Apache-2.0
"""One codec per format: float32 K or V to storage, and back.

Arrays are head-major, `[Hkv, n, D]`, so that per-head and per-channel parameters broadcast as
`[Hkv, 1, 1]` and `[Hkv, 1, D]`, and attention reads what it multiplies. The formulas stand in the
docs under "Formats"; each operation is one float32 rounding, none is fused.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from fastkv.quant import QuantSpec, QuantType
from fastkv.scales import StaticScales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

# float32 value of each e4m3 byte: a table look-up is three times as fast as the cast.
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
# Both nibbles of each int4 byte, low first, sign-extended: the two float32 as one item of 8 bytes,
# so that a byte costs one look-up.
_BYTES = np.arange(256, dtype=np.uint8)
_NIBBLES = np.stack([_BYTES & 15, _BYTES >> 4], axis=-1).astype(np.int16)
_INT4_PAIRS = ((_NIBBLES ^ 8) - 8).astype(np.float32).view(np.uint64).reshape(256)


class Params(NamedTuple):
    """Static parameters of K or V, float32, broadcastable to `[Hkv, n, D]`; None where unused."""

    quant: "F32 | None" = None
    dequant: "F32 | None" = None
    zp: "F32 | None" = None


class Codec(NamedTuple):
    """How a format stores K or V.

    Attributes:
        encode: `(x [Hkv, n, D] float32, params, storage dtype, scale dtype)` to `(stored
            [Hkv, n, D_storage], scale [Hkv, n] or None)`.
        decode: `(stored [Hkv, n, D_storage], params, scale [Hkv, n] or None)` to float32.
    """

    encode: "Callable[[F32, Params, Any, Any], tuple[NDArray[Any], NDArray[Any] | None]]"
    decode: "Callable[[NDArray[Any], Params, NDArray[Any] | None], F32]"


def params(static: StaticScales | None, side: str, heads: int) -> Params:
    """The static parameters of one side, `k` or `v`, shaped to broadcast."""
    if static is None:
        return Params()

    def broadcastable(array: Any) -> "F32 | None":
        if array is None:
            return None
        return np.asarray(array, np.float32).reshape(heads, 1, -1)

    return Params(*(broadcastable(getattr(static, f"{side}_{n}")) for n in Params._fields))


def _none_encode(x: "F32", _: Params, storage: Any, __: Any) -> "tuple[NDArray[Any], None]":
    return x.astype(storage), None


def _none_decode(stored: "NDArray[Any]", _: Params, __: Any) -> "F32":
    return stored.astype(np.float32, copy=False)


def _int8_encode(x: "F32", p: Params, storage: Any, _: Any) -> "tuple[NDArray[Any], None]":
    assert p.quant is not None, "presence was checked"
    codes = np.clip(np.rint(x * p.quant), -127, 127)
    return np.where(np.isnan(codes), 0, codes).astype(storage), None


def _int8_decode(stored: "NDArray[Any]", p: Params, _: Any) -> "F32":
    assert p.dequant is not None, "presence was checked"
    return stored.astype(np.float32) * p.dequant


def _e4m3(x: "F32", storage: Any) -> "NDArray[Any]":
    """Saturated; NaN of either sign is 0x7f, as a GPU's conversion has it."""
    return np.where(np.isnan(x), np.float32(np.nan), np.clip(x, -448, 448)).astype(storage)


def _fp8_encode(x: "F32", p: Params, storage: Any, _: Any) -> "tuple[NDArray[Any], None]":
    assert p.quant is not None, "presence was checked"
    return _e4m3(x * p.quant, storage), None


def _fp8_decode(stored: "NDArray[Any]", p: Params, _: Any) -> "F32":
    assert p.dequant is not None, "presence was checked"
    values: F32 = _E4M3_VALUES[stored.view(np.uint8)]
    return values * p.dequant


def _int4_encode(x: "F32", p: Params, _: Any, __: Any) -> "tuple[NDArray[Any], None]":
    assert p.quant is not None, "presence was checked"
    assert p.zp is not None, "presence was checked"
    codes = x * p.quant
    codes = np.where(np.isnan(codes), p.zp, codes + p.zp)
    nibbles = np.clip(np.rint(codes), -8, 7).astype(np.int8).view(np.uint8) & 15
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), None


def _int4_decode(stored: "NDArray[Any]", p: Params, _: Any) -> "F32":
    assert p.dequant is not None, "presence was checked"
    assert p.zp is not None, "presence was checked"
    codes: F32 = np.ascontiguousarray(_INT4_PAIRS[stored]).view(np.float32)
    return (codes - p.zp) * p.dequant


def _block_wise_encode(
    x: "F32", _: Params, storage: Any, scale_dtype: Any
) -> "tuple[NDArray[Any], NDArray[Any]]":
    amax = np.abs(x).max(axis=-1)  # NaN wins, and makes the row's scale NaN
    limits = ml_dtypes.finfo(scale_dtype)  # type: ignore[no-untyped-call]
    s = np.clip(amax / np.float32(448), np.float32(limits.tiny), np.float32(limits.max))
    s = np.where(amax == 0, np.float32(0), s).astype(scale_dtype)
    codes = np.where((amax == 0)[..., None], np.float32(0), x / s.astype(np.float32)[..., None])
    return _e4m3(codes, storage), s


def _block_wise_decode(stored: "NDArray[Any]", _: Params, scale: "NDArray[Any] | None") -> "F32":
    assert scale is not None, "presence was checked"
    values: F32 = _E4M3_VALUES[stored.view(np.uint8)]
    return values * scale.astype(np.float32)[..., None]


CODECS: Mapping[QuantType, Codec] = MappingProxyType(
    {
        QuantType.NONE: Codec(_none_encode, _none_decode),
        QuantType.CACHE_INT8: Codec(_int8_encode, _int8_decode),
        QuantType.CACHE_FP8: Codec(_fp8_encode, _fp8_decode),
        QuantType.CACHE_INT4_ZP: Codec(_int4_encode, _int4_decode),
        QuantType.BLOCK_WISE_FP8: Codec(_block_wise_encode, _block_wise_decode),
    }
)


def codec(quant: QuantSpec) -> Codec:
    """The codec of a format."""
    return CODECS[quant.name]
