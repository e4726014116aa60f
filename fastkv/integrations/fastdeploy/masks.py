# SPDX-License-Identifier: Apache-2.0
"""The engine's mask offsets, as fastkv takes intervals."""

from typing import Any

from fastkv.errors import ShapeError
from fastkv.integrations.fastdeploy.tensors import described, load_paddle, require_dtype


def intervals(
    op: str,
    argument: str,
    offsets: Any,
    rows: int,
    window: int | None = None,
    fmt: str | None = None,
) -> Any:
    """int32 `[T, 2]`, `[start, end)` of each row, from the engine's flat offsets.

    In the engine an interval stands in place of causality: tokens of one image see each other,
    those behind them too. A window counts from the interval's end. Whoever passes these intervals
    on therefore asks for neither `causal` nor `window`.

    Args:
        op: names the caller in errors.
        argument: the engine's name of the offsets.
        offsets: int32 `[2T]` or `[T, 2]`, start and end of each row; older versions keep the ends
            alone, `[T]`.
        rows: T.
        window: keys before the end that a row sees; None: all of the interval.
        fmt: format of the cache, for errors.
    """
    paddle = load_paddle()
    info = described(op, argument, offsets, "int32 [2T]", fmt)
    require_dtype(op, argument, info, ("int32",), fmt)
    if info.shape not in ((2 * rows,), (rows, 2), (rows,)):
        raise ShapeError(
            op,
            argument,
            format=fmt,
            expected=f"[2T] = [{2 * rows}], [T, 2] or, of ends alone, [T]",
            got=str(list(info.shape)),
        )
    if info.shape == (rows,) and rows:
        offsets = paddle.stack([paddle.zeros_like(offsets), offsets], axis=1)
    offsets = offsets.reshape([rows, 2])
    if window is None:
        return offsets
    start = paddle.maximum(offsets[:, 0], offsets[:, 1] - window)
    return paddle.stack([paddle.minimum(start, offsets[:, 1]), offsets[:, 1]], axis=1)
