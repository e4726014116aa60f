# SPDX-License-Identifier: Apache-2.0
"""`merge_states` on a GPU: one launch of kernels/merge_states.cu."""

from typing import TYPE_CHECKING, Any

from fastkv.ops.cuda import jit, serve, tensors
from fastkv.ops.cuda.launch import INT32, INT64, POINTER, completed, kernel
from fastkv.ops.cuda.plan import Plan
from fastkv.ops.cuda.tensors import CTYPE, Blob

if TYPE_CHECKING:
    from fastkv.contracts.tensors import Checker

_THREADS, _UNROLL = 256, 2
_STATES = ("out_a", "out_b", "out")


def merge_states(
    checker: "Checker", out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, *, out: Any, lse: Any
) -> None:
    """Write `out` and `lse` of the union."""
    plan: Plan = checker.prepared
    if plan is None:
        outs, lses = {"out_a": out_a, "out_b": out_b}, (lse_a, lse_b)
        plan = checker.prepared = _prepare(checker, outs, lses)
    if not plan.grid:
        return
    addresses = plan.addresses((out_a, lse_a, out_b, lse_b, out, lse))
    tensors.require_aligned(checker, _STATES, addresses[::2])
    # No value can be at fault, so there is no fault word.
    plan.kernel.launch(plan.stream(), plan.grid, *addresses, plan.constants)


def _prepare(checker: "Checker", outs: dict[str, Any], lses: tuple[Any, Any]) -> Plan:
    sizes = checker.sizes
    dim = tensors.require_head_dim(checker, 8)
    strides: list[int] = []
    for name, tensor in outs.items():
        strides += tensors.row_strides(checker, name, tensor)
    for tensor in lses:
        strides += tensors.library(checker).strides(tensor)
    chunks = sizes["T"] * sizes["Hq"] * dim // 8
    constants = Blob.of((INT64, [*strides, chunks]), (INT32, [sizes["Hq"]]))
    index = tensors.device_index(checker)
    serve.require_device(checker, None, index)
    what = jit.Specialization.of("merge_states", **_defines(checker.dtype("out_a"), dim))
    return Plan(
        kernel(what, index, _fields(constants.field), _THREADS),
        -(-chunks // (_THREADS * _UNROLL)),
        tensors.library(checker),
        constants.packed,
    )


def _defines(dtype: str, dim: int) -> dict[str, object]:
    return {"out": CTYPE[dtype], "head_dim": dim, "threads": _THREADS, "unroll": _UNROLL}


def _fields(constants: str) -> tuple[str, ...]:
    return (*(POINTER,) * 6, constants)


def specializations() -> list[jit.Specialization]:
    """Representatives of every class, for a compile check without a GPU."""
    fields = _fields(Blob.of((INT64, [0] * 9), (INT32, [0])).field)
    classes = (("bfloat16", 128), ("float16", 64), ("float32", 96))
    return [
        completed(jit.Specialization.of("merge_states", **_defines(*one)), fields)
        for one in classes
    ]
