# SPDX-License-Identifier: Apache-2.0
"""From the engine's rotary tables to a `Rope`."""

from typing import Any

from fastkv.errors import ContractError, ShapeError, UnsupportedError
from fastkv.integrations.fastdeploy.tensors import described, require_dtype
from fastkv.rope import Rope


def rope_of(
    op: str,
    rotary_embs: Any,
    head_dim: int,
    use_neox: bool | None = None,
    fmt: str | None = None,
) -> Rope:
    """The rotary tables of the engine, without a copy where they are dense.

    The width of a table tells its style: `D/2` pairs element 2i with 2i+1 (ERNIE); `D` is NeoX
    with both halves equal (Qwen, gpt-oss); less than `D/2` is NeoX over the first `2 * width`
    elements (GLM).

    Args:
        op: names the caller in errors.
        rotary_embs: float32 `[2, 1, max_len, 1, width]`: cosines, then sines.
        head_dim: D.
        use_neox: what the layer says of the style; None leaves it to the width.
        fmt: format of the cache, for errors.

    Raises:
        UnsupportedError: tables of one request each, with a sixth dimension (`rope_3d`).
        ShapeError: any other shape.
        DtypeError: not float32.
        ContractError: the layer says another style than the width.
    """
    info = described(op, "rotary_embs", rotary_embs, "float32 tables", fmt)
    require_dtype(op, "rotary_embs", info, ("float32",), fmt)
    if len(info.shape) == 6:
        raise UnsupportedError(
            op, "rope_3d", format=fmt, expected="rotary_embs of 5 dimensions", got="6"
        )
    outer = (info.shape[:2], info.shape[3:4])
    if len(info.shape) != 5 or outer != ((2, 1), (1,)) or not _is_width(info.shape[4], head_dim):
        raise ShapeError(
            op,
            "rotary_embs",
            format=fmt,
            expected=f"[2, 1, max_len, 1, width], width {head_dim}, or at most {head_dim // 2}",
            got=str(list(info.shape)),
        )
    max_len, width = info.shape[2], info.shape[4]
    interleaved = 2 * width == head_dim
    if use_neox is not None and bool(use_neox) == interleaved:
        raise ContractError(
            op,
            "use_neox_rotary_style",
            format=fmt,
            expected=f"{interleaved is False}, as tables of width {width} for D = {head_dim} say",
            got=repr(use_neox),
        )
    cos, sin = (rotary_embs[i].reshape([max_len, width]) for i in (0, 1))
    if width == head_dim:
        cos, sin = (table[:, : width // 2].contiguous() for table in (cos, sin))
    return Rope(cos, sin, interleaved=interleaved)


def _is_width(width: int, head_dim: int) -> bool:
    return 0 < width <= head_dim // 2 or width == head_dim
