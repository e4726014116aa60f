# SPDX-License-Identifier: Apache-2.0
"""Between the bytes of the engine's int8 caches and fastkv's.

The codes are the same: `clamp(rne(x * quant), -127, 127)`. The engine stores them plus 128, and
permuted for its tensor-core loads: the matrix of one page and head, `[P, D]` for K and its
transpose `[D, P]` for V, keeps blocks of 16 rows, and within one of them and 32 columns

    row 8*a + r, column 16*b + 8*c + 2*d + e  ->  row 8*b + r, column 16*a + 4*d + 2*c + e

(read off the engine's two write kernels, `append_write_cache_kv_c8_qkv` for prompts and
`append_decode_cache_int8_rope_kernel` for decode, which agree). The engine has them for D = 128 and
P = 64 alone, and so is the conversion.
"""

from typing import Any

from fastkv.errors import UnsupportedError, unknown_name
from fastkv.integrations.fastdeploy.tensors import described, load_paddle, require_dtype
from fastkv.quant import QuantType, quant_spec

_HEAD_DIM, _PAGE_SIZE = 128, 64
# Formats whose layout is known, and what the engine adds to a code of theirs.
_ADDED = {QuantType.CACHE_INT8: 128}
# The axes of [N*Hkv, R/16, a, r, C/32, b, c, d, e] in the engine's order; its own inverse.
_ORDER = (0, 1, 5, 3, 4, 2, 7, 6, 8)
_NATIVE = (2, 2, 4, 2)  # b, c, d, e
_ENGINE = (2, 4, 2, 2)  # a, d, c, e


def cache_from_fastdeploy(stored: Any, side: str, cache_quant_type: str = "cache_int8") -> Any:
    """K or V as fastkv stores it, in a new tensor.

    Args:
        stored: uint8 `[N, Hkv, 64, 128]`, as the engine's kernels wrote it.
        side: `k` or `v`.
        cache_quant_type: `cache_int8`.

    Returns:
        int8 `[N, Hkv, 64, 128]`: the same codes, in fastkv's order. Slots that no token was written
        to may hold -128.

    Raises:
        UnsupportedError: a format or shape whose layout has no conversion.
    """
    quant, shape = _check("cache_from_fastdeploy", stored, side, cache_quant_type, ("uint8",))
    codes = _permute(_flipped(stored, _ADDED[quant]), _matrix(shape, side), _ENGINE)
    if side == "v":
        codes = codes.transpose([0, 2, 1]).contiguous()
    return codes.reshape(shape).view("int8")


def cache_to_fastdeploy(codes: Any, side: str, cache_quant_type: str = "cache_int8") -> Any:
    """K or V as the engine stores it, in a new tensor.

    Args:
        codes: int8 (or its bytes as uint8) `[N, Hkv, 64, 128]`.
        side: `k` or `v`.
        cache_quant_type: `cache_int8`.

    Returns:
        uint8 `[N, Hkv, 64, 128]`.

    Raises:
        UnsupportedError: a format or shape whose layout has no conversion.
    """
    quant, shape = _check("cache_to_fastdeploy", codes, side, cache_quant_type, ("int8", "uint8"))
    pages = codes.reshape([-1, *shape[2:]]).view("uint8")
    if side == "v":
        pages = pages.transpose([0, 2, 1]).contiguous()
    return _permute(_flipped(pages, _ADDED[quant]), _matrix(shape, side), _NATIVE).reshape(shape)


def _check(
    op: str, tensor: Any, side: str, cache_quant_type: str, dtypes: tuple[str, ...]
) -> tuple[QuantType, list[int]]:
    """The format and the tensor's shape, if its layout is one that this module knows."""
    quant = quant_spec(cache_quant_type, op=op, argument="cache_quant_type")
    if quant.name not in _ADDED:
        raise UnsupportedError(
            op,
            "cache_quant_type",
            format=quant.name.value,
            expected=" or ".join(_ADDED),
            got=quant.name.value,
            hint="The layout of the other formats is not converted.",
        )
    if side not in ("k", "v"):
        raise unknown_name(op, "side", side, ("k", "v"))
    info = described(op, "cache", tensor, "a cache tensor [N, Hkv, 64, 128]", quant.name.value)
    require_dtype(op, "cache", info, dtypes, quant.name.value)
    if len(info.shape) != 4 or info.shape[2:] != (_PAGE_SIZE, _HEAD_DIM):
        raise UnsupportedError(
            op,
            "cache",
            format=quant.name.value,
            expected=f"[N, Hkv, {_PAGE_SIZE}, {_HEAD_DIM}], as the engine's int8 kernels need",
            got=str(list(info.shape)),
        )
    return quant.name, list(info.shape)


def _matrix(shape: list[int], side: str) -> list[int]:
    """Rows and columns of the matrix that the engine permutes: V is transposed."""
    return shape[2:] if side == "k" else shape[:1:-1]


def _permute(pages: Any, matrix: list[int], last: tuple[int, ...]) -> Any:
    """Swap a with b and c with d; `last` are the sizes of the last four of these axes."""
    rows, columns = matrix
    axes = [-1, rows // 16, 2, 8, columns // 32, *last]
    return pages.reshape(axes).transpose(list(_ORDER)).reshape([-1, rows, columns])


def _flipped(stored: Any, added: int) -> Any:
    """128 added to each two's complement byte, or taken off: its sign bit is flipped."""
    paddle = load_paddle()
    return paddle.bitwise_xor(stored, paddle.full_like(stored, added))
