# SPDX-License-Identifier: Apache-2.0
"""Paddle, loaded when first needed, and the checks that every op makes of its tensors."""

from typing import Any

from fastkv import arrays
from fastkv.arrays import ArrayInfo
from fastkv.contracts.presence import require_tensor
from fastkv.errors import ContractError, DtypeError, ShapeError
from fastkv.optional import require


def load_paddle() -> Any:
    """Paddle; raises `MissingDependencyError` with the line that installs it."""
    return require("paddle", "FastDeploy's ops", "pip install 'fastkv[paddle]'")


def described(
    op: str,
    argument: str,
    tensor: Any,
    expected: str,
    fmt: str | None = None,
) -> ArrayInfo:
    """The description of a tensor that must be there."""
    try:
        require_tensor(op, argument, tensor, expected)
        return arrays.describe(tensor, op, argument)
    except ContractError as error:
        error.format = fmt
        raise


def require_dtype(
    op: str,
    argument: str,
    info: ArrayInfo,
    dtypes: tuple[str, ...],
    fmt: str | None = None,
) -> None:
    """Raise `DtypeError` unless a tensor has one of the dtypes."""
    if info.dtype not in dtypes:
        raise DtypeError(op, argument, format=fmt, expected=" or ".join(dtypes), got=info.dtype)


def require_shape(
    op: str,
    argument: str,
    info: ArrayInfo,
    shape: tuple[int, ...],
    fmt: str | None = None,
) -> None:
    """Raise `ShapeError` unless a tensor has exactly this shape."""
    if info.shape != shape:
        raise ShapeError(
            op, argument, format=fmt, expected=str(list(shape)), got=str(list(info.shape))
        )


def flat_int32(
    op: str,
    argument: str,
    tensor: Any,
    least: int,
    fmt: str | None = None,
) -> Any:
    """The first `least` entries of an int32 tensor, flat.

    The engine keeps lengths as `[max_num_seqs, 1]` or `[B]`, and fewer requests may run.
    """
    info = described(op, argument, tensor, f"an int32 tensor of at least [{least}]", fmt)
    require_dtype(op, argument, info, ("int32",), fmt)
    shape = info.shape
    if len(shape) not in (1, 2) or shape[0] < least or (len(shape) == 2 and shape[1] != 1):
        raise ShapeError(
            op,
            argument,
            format=fmt,
            expected=f"[{least}] or [{least}, 1], or longer",
            got=str(list(shape)),
        )
    flat = tensor if len(shape) == 1 else tensor.reshape([-1])
    return flat if shape[0] == least else flat[:least]


def assign_rows(rows: Any, chosen: Any, target: Any) -> None:
    """Write the rows of `chosen` that `rows` marks into `target`, in place.

    Args:
        rows: bool `[T]`.
        chosen: `[T, width]`, of the target's dtype.
        target: `[T, width]`, dense, written.
    """
    paddle = load_paddle()
    if not target.shape[0]:
        return
    # Paddle selects among 32-bit elements on the CPU, and not among 16-bit ones.
    old, new = target.view("int32"), chosen.view("int32")
    paddle.assign(paddle.where(rows.unsqueeze(1), new, old), old)
