# SPDX-License-Identifier: Apache-2.0
"""`merge_states` in NumPy."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def merge_states(
    out_a: "NDArray[Any]",
    lse_a: "NDArray[np.float32]",
    out_b: "NDArray[Any]",
    lse_b: "NDArray[np.float32]",
    *,
    out: "NDArray[Any]",
    lse: "NDArray[np.float32]",
) -> None:
    """Write `out` and `lse` of the union."""
    with np.errstate(all="ignore"):  # NaN and inf are values like others here
        top = np.maximum(lse_a, lse_b)
        top = np.where(np.isneginf(top), np.float32(0), top)
        weight_a, weight_b = np.exp(lse_a - top), np.exp(lse_b - top)
        total = weight_a + weight_b
        merged = _share(out_a, lse_a, weight_a) + _share(out_b, lse_b, weight_b)
        out[...] = np.where(total[..., None] == 0, 0, merged / total[..., None])
        lse[...] = top + np.log(total)


def _share(
    out: "NDArray[Any]", lse: "NDArray[np.float32]", weight: "NDArray[np.float32]"
) -> "NDArray[np.float32]":
    # An empty state's out is not read: 0 * NaN would be NaN.
    empty = np.isneginf(lse)[..., None]
    return np.where(empty, np.float32(0), out.astype(np.float32) * weight[..., None])
