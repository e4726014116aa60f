# SPDX-License-Identifier: Apache-2.0
"""What launchers derive from a call's tensors: constants, strides, and refusals by name.

All of it depends on metadata alone, so a launcher asks once per signature and keeps the answer in
`checker.prepared`; only pointers are read at each call.
"""

import struct
from collections.abc import Mapping, Sequence
from math import gcd
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkv import arrays
from fastkv.dtypes import ITEMSIZE
from fastkv.errors import UnsupportedError
from fastkv.ops.cuda import serve
from fastkv.ops.cuda.includes import CODECS
from fastkv.scales import FIELDS

if TYPE_CHECKING:
    from fastkv.cache import LayerCache
    from fastkv.contracts.tensors import Checker
    from fastkv.quant import QuantSpec

#: The kernels' names of dtypes.
CTYPE = {
    "bfloat16": "Bf16",
    "float16": "Fp16",
    "float32": "float",
    "float8_e4m3fn": "E4m3",
    "int8": "u8",
    "uint8": "u8",
}
#: Bytes that the kernels load at once.
VECTOR = 16


class Blob(NamedTuple):
    """The part of a parameter struct that stays the same from call to call, packed once.

    Attributes:
        field: what stands for it in a kernel's list of fields.
        packed: its bytes.
    """

    field: str
    packed: bytes

    @classmethod
    def of(cls, *parts: tuple[str, Sequence[float]]) -> "Blob":
        """Of `(struct field, values)` in order, 8-byte fields before 4-byte ones."""
        packed = b"".join(struct.pack(f"={len(values)}{kind}", *values) for kind, values in parts)
        packed += bytes(-len(packed) % 8)
        return cls(f"{len(packed)}s", packed)


def device_index(checker: "Checker") -> int:
    """N of the call's `cuda:N`."""
    assert checker.first is not None, "a contract describes at least one tensor"
    index = arrays.gpu_index(checker.first.device)
    assert index is not None, "dispatch brings calls on a GPU"
    return index


def library(checker: "Checker") -> Any:
    """How the call's library is launched on."""
    assert checker.first is not None, "a contract describes at least one tensor"
    return arrays.on_device(checker.first.library)


def unsupported(checker: "Checker", argument: str, expected: str, got: object) -> UnsupportedError:
    """The error for what no kernel serves."""
    return UnsupportedError(
        checker.op, argument, format=checker.format, expected=expected, got=str(got)
    )


def require_head_dim(checker: "Checker", multiple: int, most: int | None = None) -> int:
    """D, refused unless a multiple of what a kernel cuts it in, and at most `most`."""
    dim = checker.sizes["D"]
    if dim % multiple or (most is not None and dim > most):
        limit = "" if most is None else f" up to {most}"
        expected = f"a head dim that is a multiple of {multiple}{limit} on a GPU"
        raise unsupported(checker, "D", expected, dim)
    return dim


def require_contiguous(checker: "Checker", tensors: Mapping[str, Any]) -> None:
    """Refuse, by name, small tensors that do not lie in one dense piece; None is none."""
    strides_of = library(checker).strides
    for name, tensor in tensors.items():
        if tensor is None or 0 in tensor.shape:
            continue
        want = 1
        strides = strides_of(tensor)
        for size, stride in zip(reversed(tensor.shape), reversed(strides), strict=True):
            if size > 1 and stride != want:
                raise unsupported(checker, name, "a contiguous tensor on a GPU", _spell(strides))
            want *= size


def row_strides(checker: "Checker", name: str, tensor: Any, unit: int = VECTOR) -> tuple[int, ...]:
    """Strides, in elements, of all axes but the last, which must be dense.

    Rows must begin at multiples of `unit` bytes, unless there is only one.
    """
    *outer, last = library(checker).strides(tensor)
    *sizes, width = tensor.shape
    item = ITEMSIZE[checker.dtype(name)]
    if 0 in tensor.shape:
        return tuple(outer)
    if last != 1 and width > 1:
        raise unsupported(checker, name, "a last axis of stride 1 on a GPU", _spell((*outer, last)))
    for size, stride in zip(sizes, outer, strict=True):
        if size > 1 and stride * item % unit:
            expected = f"strides of a multiple of {unit} bytes on a GPU"
            raise unsupported(checker, name, expected, f"{stride} elements of {item} bytes")
    return tuple(outer)


def query_strides(checker: "Checker", q: Any, out: Any) -> list[int]:
    """Token and head strides, in elements, of q and then of `out`, which the op made if not given.

    Rows must begin at multiples of `VECTOR` bytes.
    """
    sizes = checker.sizes
    made = (sizes["Hq"] * sizes["D"], sizes["D"])
    rows = row_strides(checker, "out", out) if checker.given("out") else made
    return [*row_strides(checker, "q", q), *rows]


def require_mask_aligned(checker: "Checker", pointer: int) -> None:
    """Refuse `mask_offsets` at no multiple of 8 bytes: a row's interval is one load."""
    if pointer % 8:
        expected = "memory aligned to 8 bytes on a GPU"
        raise unsupported(checker, "mask_offsets", expected, f"address {pointer:#x}")


def require_aligned(checker: "Checker", names: Sequence[str], pointers: Sequence[int]) -> None:
    """Refuse, by name, a pointer that is not a multiple of 16 bytes. Runs at every call.

    Args:
        checker: the checked call.
        names: of the first pointers; those behind them may lie anywhere.
        pointers: addresses.
    """
    if gcd(VECTOR, *pointers[: len(names)]) != VECTOR:
        wrong = [(name, at) for name, at in zip(names, pointers, strict=False) if at % VECTOR]
        name, at = wrong[0]
        expected = f"memory aligned to {VECTOR} bytes on a GPU"
        raise unsupported(checker, name, expected, f"address {at:#x}")


def page_shift(checker: "Checker") -> int:
    """log2(P); other page sizes than powers of two are refused."""
    size = checker.sizes["P"]
    if size & (size - 1):
        raise unsupported(checker, "page_size", "a power of two on a GPU", size)
    return size.bit_length() - 1


def cache_strides(checker: "Checker", cache: "LayerCache") -> list[int]:
    """`SideStrides` of K, then of V: page, head, slot; the scales' page, head, slot; in bytes."""
    found: list[int] = []
    strides_of = library(checker).strides
    item = ITEMSIZE[cache.spec.storage_dtype(cache.layer_id)]
    for side in ("k", "v"):
        rows = row_strides(checker, f"cache.{side}", getattr(cache, side))
        found += [item * stride for stride in rows]
        scale = getattr(cache, f"{side}_scale")
        strides = (0, 0, 0) if scale is None else strides_of(scale)
        found += [ITEMSIZE[cache.spec.scale_dtype] * stride for stride in strides]
    return found


def table_shape(checker: "Checker", block_table: Any) -> tuple[list[int], list[int]]:
    """`TableShape`: its 8-byte and its 4-byte fields."""
    sizes = checker.sizes
    return list(library(checker).strides(block_table)), [
        sizes["M"],
        sizes["N"],
        page_shift(checker),
        sizes["B"],
    ]


def codec_defines(quant: "QuantSpec", storage: str, scale_dtype: str) -> dict[str, object]:
    """Constants that select a format's codec.

    Args:
        quant: the format's row.
        storage: dtype of K and V.
        scale_dtype: dtype of paged scales.
    """
    defines: dict[str, object] = {"codec_header": f"<{CODECS}/{quant.name.value}.cuh>"}
    if quant.storage is None:
        defines["storage"] = CTYPE[storage]
    if quant.needs_paged_scales:
        defines["scale"] = CTYPE[scale_dtype]
    return defines


def cache_defines(checker: "Checker", cache: "LayerCache") -> dict[str, object]:
    """`codec_defines` of a layer; refuses what the device has no conversions for."""
    serve.require_device(checker, cache, device_index(checker))
    storage = cache.spec.storage_dtype(cache.layer_id)
    return codec_defines(cache.quant, storage, cache.spec.scale_dtype)


def static_defines(checker: "Checker", cache: "LayerCache", direction: str) -> dict[str, object]:
    """Constants of the static arrays that a kernel reads: dtype, per head or per channel.

    Args:
        checker: the checked call.
        cache: the layer.
        direction: `quant` or `dequant`.
    """
    static = cache.static
    if static is None:
        return {}
    fields = (f"k_{direction}", f"v_{direction}", "k_zp", "v_zp")
    names = [name for name in fields if name in cache.quant.static_fields]
    used = {name: getattr(static, name) for name in names}
    require_contiguous(checker, {f"cache.static.{name}": array for name, array in used.items()})
    heads, first = checker.sizes["Hkv"], names[0]
    kinds = {
        name: (checker.dtype(f"cache.static.{name}"), tuple(array.shape) != (heads,))
        for name, array in used.items()
    }
    for name, kind in kinds.items():
        if kind != kinds[first]:
            raise unsupported(
                checker,
                f"cache.static.{name}",
                f"the dtype and the granularity of {first} on a GPU: "
                f"{kinds[first][0]} {list(used[first].shape)}",
                f"{kind[0]} {list(used[name].shape)}",
            )
    dtype, per_channel = kinds[first]
    return {"static": CTYPE[dtype], "per_channel": int(per_channel)}


#: The fields of a bundle that is not there. Where there is one, the contract has seen to it that
#: it holds what the format needs, and None else.
NO_STATIC: Any = SimpleNamespace(**dict.fromkeys(FIELDS))
#: `StaticPointers` in errors: multipliers of either direction, zero points.
STATIC_ARGUMENTS = (
    "cache.static (K)",
    "cache.static (V)",
    "cache.static.k_zp",
    "cache.static.v_zp",
)


def _spell(strides: Sequence[int]) -> str:
    return f"strides {list(strides)}"
