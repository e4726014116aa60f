# SPDX-License-Identifier: Apache-2.0
"""What every result is compared with: float64, plain, and without a line of fastkv.

The formulas are written down again from the specification of the formats. Where a format fixes
bytes it fixes float32 arithmetic, so `f32` marks each rounding: a float64 operation on float32
values, rounded once more, gives exactly the float32 result (53 >= 2 * 24 + 2 bits).

Tokens are `[n, H, D]` everywhere.
"""

import math

import numpy as np


def f32(x):
    """Round to float32 and go on in float64."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)


# --- float formats ---------------------------------------------------------------------------


def _e4m3_value(byte: int) -> float:
    """Bits s eeee mmm, bias 7, no infinities; s 1111 111 is NaN."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = np.array([_e4m3_value(byte) for byte in range(256)])


def to_e4m3(x):
    """Bytes of the nearest e4m3 values, ties to the even byte; NaN is 0x7f; |x| <= 448 or NaN."""
    x = np.asarray(x, np.float64)
    magnitude = np.abs(x)
    above = np.clip(np.searchsorted(E4M3[:127], magnitude), 1, 126)
    below = above - 1
    up, down = E4M3[above] - magnitude, magnitude - E4M3[below]
    byte = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    byte = np.where(np.isnan(x), 127, byte)
    return (byte + np.where(np.signbit(x) & ~np.isnan(x), 128, 0)).astype(np.uint8)


def from_e4m3(stored):
    return E4M3[np.asarray(stored).view(np.uint8)]


def to_bfloat16_bits(x):
    """The upper half of float32, rounded to nearest even; NaN keeps a bit that says so."""
    with np.errstate(over="ignore"):
        bits = np.asarray(x, np.float64).astype(np.float32).view(np.uint32).astype(np.int64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16_bits(bits):
    return (
        (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16))
        .view(np.float32)
        .astype(np.float64)
    )


def to_bits(x, dtype: str):
    """Storage bits of values in `float32`, `float16` or `bfloat16`."""
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            return to_bfloat16_bits(x)
        if dtype == "float16":
            return f32(x).astype(np.float16).view(np.uint16)
        return f32(x).astype(np.float32).view(np.uint32)


def from_bits(bits, dtype: str):
    if dtype == "bfloat16":
        return from_bfloat16_bits(bits)
    return np.asarray(bits).view(dtype).astype(np.float64)


def values_of(array):
    """Float64 values of an array of any float dtype, ml_dtypes' bfloat16 included."""
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return from_bfloat16_bits(array.view(np.uint16))
    return array.astype(np.float64)


# --- cache formats ---------------------------------------------------------------------------


def _channels(multiplier, heads: int, dim: int):
    """`[H]`, `[H, D]` or flat `[H * D]` spread to `[H, D]`, by explicit index."""
    flat = values_of(multiplier).reshape(-1)
    each = len(flat) // heads
    assert each * heads == len(flat), "a multiplier per head or per channel"
    assert each in (1, dim), "a multiplier per head or per channel"
    return np.array(
        [[flat[h * each + (d if each > 1 else 0)] for d in range(dim)] for h in range(heads)]
    )


def _quantize_none(x, *, dtype, **_):
    return to_bits(x, dtype), None


def _quantize_int8(x, *, quant, **_):
    codes = np.rint(f32(x * quant))
    codes = np.where(np.isnan(codes), 0, np.minimum(np.maximum(codes, -127), 127))
    return np.where(codes < 0, codes + 256, codes).astype(np.uint8), None


def _quantize_fp8(x, *, quant, **_):
    scaled = f32(x * quant)
    return to_e4m3(np.where(scaled > 448, 448, np.where(scaled < -448, -448, scaled))), None


def _quantize_int4_zp(x, *, quant, zp, **_):
    scaled = f32(f32(x * quant) + zp)
    codes = np.rint(np.where(np.isnan(x), zp, scaled))
    codes = np.where(codes < -8, -8, np.where(codes > 7, 7, codes)).astype(int)
    nibbles = np.where(codes < 0, codes + 16, codes)
    return (nibbles[..., ::2] + 16 * nibbles[..., 1::2]).astype(np.uint8), None


SMALLEST_NORMAL = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}
LARGEST_FINITE = {
    "float32": (2 - 2.0**-23) * 2.0**127,
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
    "float16": 65504.0,
}


def _quantize_block_wise(x, *, scale_dtype, **_):
    """The one format whose multiplier depends on what is written, row by row."""
    amax = np.abs(x).max(axis=-1)  # NaN if any element is
    s = np.clip(f32(amax / 448), SMALLEST_NORMAL[scale_dtype], LARGEST_FINITE[scale_dtype])
    s = np.where(amax == 0, 0.0, from_bits(to_bits(s, scale_dtype), scale_dtype))
    scaled = np.clip(f32(x / np.where(amax == 0, 1.0, s)[..., None]), -448, 448)
    stored = np.where(np.isnan(amax)[..., None], 0x7F, to_e4m3(scaled))
    stored = np.where((amax == 0)[..., None], 0, stored).astype(np.uint8)
    return stored, to_bits(s, scale_dtype)


_QUANTIZE = {
    "none": _quantize_none,
    "cache_int8": _quantize_int8,
    "cache_fp8": _quantize_fp8,
    "cache_int4_zp": _quantize_int4_zp,
    "block_wise_fp8": _quantize_block_wise,
}


def quantize(fmt: str, x, *, quant=None, zp=None, dtype="float32", scale_dtype="float32"):
    """Stored bits of tokens.

    Args:
        fmt: name of the format.
        x: `[n, H, D]`, float32 values.
        quant: the multiplier, `[H]`, `[H, D]` or `[H * D]`.
        zp: the zero point, `[H, D]` or `[H * D]`.
        dtype: of a `none` cache.
        scale_dtype: of paged scales.

    Returns:
        Unsigned integers `[n, H, D_storage]` and, for dynamic formats, `[n, H]`: storage bits.
    """
    x = values_of(x)
    heads, dim = x.shape[1:]
    quant = None if quant is None else _channels(quant, heads, dim)
    zp = None if zp is None else _channels(zp, heads, dim)
    with np.errstate(invalid="ignore"):
        return _QUANTIZE[fmt](x, quant=quant, zp=zp, dtype=dtype, scale_dtype=scale_dtype)


def dequantize(
    fmt: str, stored, *, dequant=None, zp=None, scale=None, dtype="float32", scale_dtype="float32"
):
    """Float64 holding the float32 values `[n, H, D]` of stored bits, as `quantize` returns them."""
    stored = np.asarray(stored)
    stored = stored.view(f"u{stored.dtype.itemsize}")
    heads = stored.shape[1]
    with np.errstate(invalid="ignore"):
        if fmt == "none":
            return from_bits(stored, dtype)
        if fmt == "cache_int8":
            signed = stored.astype(int) - 256 * (stored > 127)
            return f32(signed * _channels(dequant, heads, stored.shape[2]))
        if fmt == "cache_fp8":
            return f32(E4M3[stored] * _channels(dequant, heads, stored.shape[2]))
        if fmt == "block_wise_fp8":
            scale = np.asarray(scale)
            scale = from_bits(scale.view(f"u{scale.dtype.itemsize}"), scale_dtype)
            return f32(E4M3[stored] * scale[..., None])
        assert fmt == "cache_int4_zp", fmt
        nibbles = np.empty((*stored.shape[:2], 2 * stored.shape[2]), int)
        nibbles[..., ::2], nibbles[..., 1::2] = stored % 16, stored // 16
        codes = nibbles - 16 * (nibbles > 7)
        dim = codes.shape[2]
        return f32(f32(codes - _channels(zp, heads, dim)) * _channels(dequant, heads, dim))


def read_cache(cache, side: str, pages, length: int):
    """Float64 `[L, Hkv, D]` of one request's tokens, one by one; NaN where its page is -1.

    Args:
        cache: anything with the attributes of a `LayerCache`, NumPy tensors within.
        side: `k` or `v`.
        pages: the request's row of the block table.
        length: L.
    """
    spec, data, scale = cache.spec, getattr(cache, side), getattr(cache, f"{side}_scale")
    static = cache.static
    tokens = np.full((length, spec.num_kv_heads, spec.head_dim), np.nan)
    for i in range(length):
        page, slot = int(pages[i // spec.page_size]), i % spec.page_size
        if page < 0:
            continue
        tokens[i] = dequantize(
            cache.quant.name.value,
            np.ascontiguousarray(data[page, :, slot])[None],
            dequant=None if static is None else getattr(static, f"{side}_dequant"),
            zp=None if static is None else getattr(static, f"{side}_zp"),
            scale=None if scale is None else np.ascontiguousarray(scale[page, :, slot])[None],
            dtype=spec.dtype,
            scale_dtype=spec.scale_dtype,
        )[0]
    return tokens


# --- norm, rotation, attention ----------------------------------------------------------------


def rms_norm(x, weight, eps: float):
    x = values_of(x)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * values_of(weight)


def rope(x, cos, sin, interleaved: bool, step=np.float64):
    """Rotate `x [n, H, D]` by the tables' rows `[n, rotary_dim / 2]` of each token's position.

    With `step=f32` every product, sum and difference is rounded to float32.
    """
    x, cos, sin = values_of(x), values_of(cos), values_of(sin)
    half = cos.shape[1]
    rotated = x.copy()
    for i in range(half):
        one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = cos[:, None, i], sin[:, None, i]
        rotated[..., one] = step(step(x[..., one] * c) - step(x[..., two] * s))
        rotated[..., two] = step(step(x[..., one] * s) + step(x[..., two] * c))
    return rotated


def visible_mask(n: int, length: int, causal: bool, window=None, intervals=None):
    """Booleans `[n, L]`: which keys each of the request's last n positions sees, one by one."""
    mask = np.zeros((n, length), bool)
    for j in range(n):
        position = length - n + j
        for i in range(length):
            seen = not causal or i <= position
            if window is not None:
                seen = seen and i > position - window
            if intervals is not None:
                seen = seen and intervals[j][0] <= i < intervals[j][1]
            mask[j, i] = seen
    return mask


def attention(q, k, v, mask, scale, soft_cap=None, sinks=None):
    """Attention of one request: a softmax over the visible keys alone, row by row.

    Args:
        q: `[n, Hq, D]`.
        k: `[L, Hkv, D]`.
        v: `[L, Hkv, D]`.
        mask: booleans `[n, L]`, or `[L]` for each row alike.
        scale: multiplies q.k.
        soft_cap: caps the logits, or None.
        sinks: `[Hq]` logits that join the denominator but not the LSE, or None.

    Returns:
        Float64 `out [n, Hq, D]` and the natural-log `lse [n, Hq]`.
    """
    q, k, v = values_of(q), values_of(k), values_of(v)
    n, query_heads, _ = q.shape
    group = query_heads // k.shape[1]
    mask = np.broadcast_to(mask, (n, len(k)))
    out, lse = np.zeros((n, query_heads, v.shape[2])), np.full((n, query_heads), -np.inf)
    for j in range(n):
        seen = np.flatnonzero(mask[j])
        for h in range(query_heads if len(seen) else 0):
            with np.errstate(all="ignore"):  # NaN and inf are values like others here
                sink = None if sinks is None else float(sinks[h])
                head = h // group
                out[j, h], lse[j, h] = _attend_row(
                    q[j, h], k[seen, head], v[seen, head], scale, soft_cap, sink
                )
    return out, lse


def _attend_row(q, k, v, scale, soft_cap, sink):
    logits = k @ q * scale
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    top = logits.max()
    weights = np.exp(logits - top)
    total = weights.sum()
    denominator = total if sink is None else total + np.exp(sink - top)
    return weights @ v / denominator, top + np.log(total)
