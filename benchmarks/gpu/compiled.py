# SPDX-License-Identifier: Apache-2.0
"""Gather and dequantize as one writes it in PyTorch, compiled: the peer of `gather_kv`.

Each format's formula is the one of its definition, in float32, rounded to bf16; inductor fuses
all of it into one kernel for K and one for V. The cache is NHD, which spares the transposition.
"""

from collections.abc import Callable
from typing import Any

import torch

from gpu.data import Format, Pool


def gather(fmt: Format, pool: Pool) -> Callable[..., Any]:
    """`f(k, v, k_scale, v_scale, table)` -> K and V, `[M, P, Hkv, D]` bf16, not yet compiled."""
    static = pool.static

    def side(x: torch.Tensor, scale: Any, name: str, table: torch.Tensor) -> torch.Tensor:
        codes = fetch(x, table)
        if fmt.quant.storage is None:
            return codes
        values = unpack(codes) if fmt.quant.elements_per_item == 2 else codes.float()
        if static is None:
            return (values * scale[table][..., None]).bfloat16()
        zero_point = getattr(static, f"{name}_zp")
        if zero_point is not None:
            values = values - zero_point
        dequant = getattr(static, f"{name}_dequant")
        return (values * (dequant if dequant.ndim == 2 else dequant[:, None])).bfloat16()

    def both(k: Any, v: Any, k_scale: Any, v_scale: Any, table: torch.Tensor) -> Any:
        return side(k, k_scale, "k", table), side(v, v_scale, "v", table)

    return both


def fetch(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Pages of the table; fp8 by its bytes, since PyTorch does not index it."""
    if x.dtype == torch.float8_e4m3fn:
        return x.view(torch.int8)[table].view(torch.float8_e4m3fn)
    return x[table]


def unpack(codes: torch.Tensor) -> torch.Tensor:
    """Two's-complement nibbles, the low one first, as float32."""
    wide = codes.int()
    low, high = (((nibble & 15) ^ 8) - 8 for nibble in (wide, wide >> 4))
    return torch.stack([low, high], dim=-1).flatten(-2).float()


def nhd(pool: Pool, page: int, index: int) -> list[torch.Tensor | None]:
    """K, V and their paged scales of one set, heads behind tokens; copies."""
    flats = (pool.k, pool.v, pool.k_scale, pool.v_scale)
    tensors = (pool.paged(x, page, index) for x in flats)
    return [None if x is None else x.transpose(1, 2).contiguous() for x in tensors]
