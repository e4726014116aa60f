# SPDX-License-Identifier: Apache-2.0
"""`masked_attention` on a GPU: one launch of kernels/masked_attention.cu."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkv.ops.cuda import jit, serve, tensors
from fastkv.ops.cuda.launch import FLOAT, INT32, INT64, POINTER, completed, kernel
from fastkv.ops.cuda.masked_shape import Shape, most_tiles
from fastkv.ops.cuda.plan import Plan
from fastkv.ops.cuda.tensors import CTYPE, Blob

if TYPE_CHECKING:
    from fastkv.contracts.tensors import Checker

# Of a window, and where there is none: the kernel subtracts it from positions.
_NO_WINDOW = 0x3FFFFFFF
# The parameter struct: pointers, the fault word's among them; the blob; what a call may change.
_POINTERS = (POINTER,) * 10
_SCALARS = (INT32,) * 2 + (FLOAT,) * 2
_ALIGNED = ("q", "out", "k", "v")


class _Prepared(NamedTuple):
    """What a call's metadata decides: the plan, and the scale where none is given."""

    plan: Plan
    scale: float


def masked_attention(
    checker: "Checker",
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    mask_offsets: Any,
    causal: bool,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    sinks: Any,
    out: Any,
    lse: Any,
) -> None:
    """Write `out`, and `lse` where it is given; see `fastkv.ops.masked_attention`."""
    prepared: _Prepared = checker.prepared
    if prepared is None:
        small = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        small |= {"mask_offsets": mask_offsets, "sinks": sinks}
        prepared = checker.prepared = _prepare(checker, {"q": q, "k": k, "v": v}, out, small)
    plan = prepared.plan
    attended: tuple[Any, ...] = (q, out, lse, k, v)
    addresses = plan.addresses((*attended, cu_seqlens_q, cu_seqlens_k, mask_offsets, sinks))
    at_q, at_out, _, at_k, at_v, *_, at_mask, _ = addresses
    tensors.require_aligned(checker, _ALIGNED, (at_q, at_out, at_k, at_v))
    tensors.require_mask_aligned(checker, at_mask)
    plan.launch(
        checker,
        plan.stream(),
        addresses,
        int(causal),
        _NO_WINDOW if window is None else min(window, _NO_WINDOW),
        prepared.scale if scale is None else scale,
        soft_cap or 0.0,
    )


def _prepare(
    checker: "Checker", data: dict[str, Any], out: Any, small: dict[str, Any]
) -> _Prepared:
    """Refuse what the kernel does not serve; compile; size the grid."""
    index, sizes = tensors.device_index(checker), checker.sizes
    serve.require_served(checker, None, index)
    _require_dtypes(checker)
    tensors.require_contiguous(checker, small)
    dim, dtype = sizes["D"], checker.dtype("q")
    strides = tensors.query_strides(checker, data["q"], out)
    for name in ("k", "v"):
        strides += tensors.row_strides(checker, name, data[name])
    heads, fresh = sizes["Hkv"], int(not checker.given("out"))
    counts = [sizes["T"], sizes["Tk"], sizes["B"], heads, sizes["Hq"] // heads, fresh]
    blob = _blob(strides, counts)
    shape = Shape.of(dim, jit.arch_of(jit.device_facts(index).sm))
    what = jit.Specialization.of("masked_attention", **_defines(dtype, dim, shape))
    made = kernel(what, index, _fields(blob), shape.threads, shape.shared)
    most = most_tiles(sizes["T"], sizes["B"], sizes["Hq"])
    grid = max(1, min(made.resident_blocks, most))
    return _Prepared(Plan(made, grid, tensors.library(checker), blob.packed), dim**-0.5)


def _require_dtypes(checker: "Checker") -> None:
    """Refuse all but a q of 16 bits and a K of its dtype; V has K's by contract."""
    q, k = checker.dtype("q"), checker.dtype("k")
    if q not in _DTYPES:
        raise tensors.unsupported(checker, "q", f"{' or '.join(_DTYPES)} on a GPU", q)
    if k != q:
        raise tensors.unsupported(checker, "k", f"q's dtype, {q}, on a GPU", k)


_DTYPES = ("bfloat16", "float16")


def _blob(strides: Sequence[int], counts: Sequence[int]) -> Blob:
    return Blob.of((INT64, strides), (INT32, counts))


def _fields(blob: Blob) -> tuple[str, ...]:
    return (*_POINTERS, blob.field, *_SCALARS)


def _defines(dtype: str, dim: int, shape: Shape) -> dict[str, object]:
    return {
        "q": CTYPE[dtype],
        "d": dim,
        "warpgroups": shape.warpgroups,
        "shared_bytes": shape.shared,
    }


# dtype and D; each for the architecture that has warpgroups and for the others.
_EXAMPLES = (("bfloat16", 128), ("bfloat16", 256), ("float16", 64), ("bfloat16", 96))


def specializations() -> list[jit.Specialization]:
    """Representatives of every class, for `fastkv.ops.cuda.listing`."""
    return [_example(*one, arch) for arch in (jit.WARPGROUPS_ARCH, "sm_80") for one in _EXAMPLES]


def _example(dtype: str, dim: int, arch: str) -> jit.Specialization:
    defines = _defines(dtype, dim, Shape.of(dim, arch))
    blob = _blob([0] * 8, [0] * 6)
    return completed(jit.Specialization.of("masked_attention", **defines), _fields(blob))
