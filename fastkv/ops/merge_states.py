# SPDX-License-Identifier: Apache-2.0
"""Merge attention over two disjoint sets of keys."""

from typing import Any

from fastkv.contracts import calls
from fastkv.ops import dispatch


def merge_states(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Any, Any]:
    """The attention over the union of two disjoint sets of keys.

    `lse = log(exp(lse_a) + exp(lse_b))`, `out = exp(lse_a - lse) * out_a + exp(lse_b - lse) *
    out_b`. A state with lse = -inf is empty: its `out` is not read, whatever it holds, and two
    empty states give (0, -inf). Attention sinks belong in neither state: apply them to the merged
    one, `out / (1 + exp(sink - lse))`.

    Args:
        out_a: `[T, Hq, D]`, bf16, fp16 or fp32.
        lse_a: float32 `[T, Hq]`, natural log.
        out_b: as `out_a`, same dtype.
        lse_b: as `lse_a`.

    Returns:
        `(out, lse)`, in the dtypes of the inputs.

    Raises:
        ContractError: a missing, misshapen or misplaced tensor.
    """
    call = calls.merge_states(out_a, lse_a, out_b, lse_b)
    out = dispatch.result(call, ("T", "Hq", "D"), call.dtype("out_a"))
    lse = dispatch.result(call, ("T", "Hq"), "float32")
    if call.sizes["T"]:
        dispatch.runner(call)(out_a, lse_a, out_b, lse_b, out=out, lse=lse)
    return out, lse
