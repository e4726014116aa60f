# SPDX-License-Identifier: Apache-2.0
"""`copy_pages` on a GPU: one launch of kernels/copy_pages.cu."""

from typing import TYPE_CHECKING, Any

from fastkv.cache import LayerCache
from fastkv.dtypes import ITEMSIZE
from fastkv.ops.cuda import jit, serve, tensors
from fastkv.ops.cuda.launch import INT32, INT64, POINTER, completed, kernel
from fastkv.ops.cuda.plan import Plan
from fastkv.ops.cuda.tensors import VECTOR, Blob

if TYPE_CHECKING:
    from fastkv.contracts.tensors import Checker

_THREADS, _UNROLL = 256, 4
# The parameter struct's first pointers, which the kernel reads or writes in vectors.
_ALIGNED = ("cache.k", "cache.v")


def copy_pages(checker: "Checker", cache: LayerCache, src: Any, dst: Any) -> None:
    """Copy page `src[i]` to page `dst[i]` in every tensor of the layer."""
    plan: Plan = checker.prepared
    if plan is None:
        tensors.require_contiguous(checker, {"src": src, "dst": dst})
        plan = checker.prepared = _prepare(checker, cache)
    addresses = plan.addresses((cache.k, cache.v, cache.k_scale, cache.v_scale, src, dst))
    tensors.require_aligned(checker, _ALIGNED, addresses)
    plan.launch(checker, plan.stream(), addresses)


def _prepare(checker: "Checker", cache: LayerCache) -> Plan:
    sizes, spec = checker.sizes, cache.spec
    row_bytes = sizes["D_storage"] * ITEMSIZE[spec.storage_dtype(cache.layer_id)]
    if row_bytes % VECTOR:
        expected = f"a head of a multiple of {VECTOR} bytes in the cache on a GPU"
        raise tensors.unsupported(checker, "D", expected, f"{row_bytes} bytes")
    vectors = 2 * sizes["Hkv"] * sizes["P"] * row_bytes // VECTOR
    parts = -(-vectors // (_THREADS * _UNROLL))
    counts = [sizes["N"], sizes["Hkv"], parts]
    constants = Blob.of((INT64, tensors.cache_strides(checker, cache)), (INT32, counts))
    index = tensors.device_index(checker)
    serve.require_device(checker, cache, index)
    scale_bytes = ITEMSIZE[spec.scale_dtype] if cache.quant.needs_paged_scales else 0
    defines = _defines(row_bytes, scale_bytes, tensors.page_shift(checker))
    what = jit.Specialization.of("copy_pages", **defines)
    return Plan(
        kernel(what, index, _fields(constants.field), _THREADS),
        sizes["n"] * parts,
        tensors.library(checker),
        constants.packed,
    )


def _defines(row_bytes: int, scale_bytes: int, page_shift: int) -> dict[str, object]:
    return {
        "row_bytes": row_bytes,
        "scale_bytes": scale_bytes,
        "page_shift": page_shift,
        "threads": _THREADS,
        "unroll": _UNROLL,
    }


def _fields(constants: str) -> tuple[str, ...]:
    return (*(POINTER,) * 7, constants)


def specializations() -> list[jit.Specialization]:
    """Representatives of every class, for a compile check without a GPU."""
    fields = _fields(Blob.of((INT64, [0] * 12), (INT32, [0] * 3)).field)
    classes = ((256, 0, 4), (96, 0, 5), (64, 0, 6), (128, 4, 4), (128, 2, 7))
    return [
        completed(jit.Specialization.of("copy_pages", **_defines(*one)), fields) for one in classes
    ]
