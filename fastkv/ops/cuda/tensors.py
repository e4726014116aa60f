# SPDX-License-Identifier: Apache-2.0
"""What launchers derive from a call's tensors: constants, strides, and refusals by name.

All of it depends on metadata alone, so a launcher asks once per signature and keeps the answer in
`checker.prepared`; only pointers are read at each call.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkv import arrays
from fastkv.dtypes import ITEMSIZE
from fastkv.errors import UnsupportedError
from fastkv.ops.cuda import jit, launch

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
# The least compute capability with the conversions of a storage dtype; any other: MIN_SM.
_LEAST_SM = {"float8_e4m3fn": 89}
MIN_SM = 80


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
    return int(checker.first.device[5:])


def library(checker: "Checker") -> Any:
    """How the call's library is launched on."""
    assert checker.first is not None, "a contract describes at least one tensor"
    return arrays.on_device(checker.first.library)


def unsupported(checker: "Checker", argument: str, expected: str, got: object) -> UnsupportedError:
    """The error for what no kernel serves."""
    return UnsupportedError(
        checker.op, argument, format=checker.format, expected=expected, got=str(got)
    )


def require_head_dim(checker: "Checker", multiple: int) -> int:
    """D, refused unless a multiple of what a kernel cuts it in."""
    dim = checker.sizes["D"]
    if dim % multiple:
        expected = f"a head dim that is a multiple of {multiple} on a GPU"
        raise unsupported(checker, "D", expected, dim)
    return dim


def require_contiguous(checker: "Checker", tensors: Mapping[str, Any]) -> None:
    """Refuse, by name, small tensors that do not lie in one dense piece; None is none."""
    strides_of = library(checker).strides
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        want = 1
        strides = strides_of(tensor)
        for size, stride in zip(reversed(tensor.shape), reversed(strides), strict=True):
            if size > 1 and stride != want:
                raise unsupported(checker, name, "a contiguous tensor on a GPU", _spell(strides))
            want *= size


def row_strides(checker: "Checker", name: str, tensor: Any, dtype: str) -> tuple[int, ...]:
    """Strides, in elements, of all axes but the last, which must be dense.

    Rows must begin at multiples of 16 bytes, unless there is only one.
    """
    *outer, last = library(checker).strides(tensor)
    *sizes, width = tensor.shape
    item = ITEMSIZE[dtype]
    if last != 1 and width > 1:
        raise unsupported(checker, name, "a last axis of stride 1 on a GPU", _spell((*outer, last)))
    for size, stride in zip(sizes, outer, strict=True):
        if size > 1 and stride * item % VECTOR:
            expected = f"strides of a multiple of {VECTOR} bytes on a GPU"
            raise unsupported(checker, name, expected, f"{stride} elements of {item} bytes")
    return tuple(outer)


def misaligned(checker: "Checker", pointers: Mapping[str, int]) -> UnsupportedError:
    """The error for the first pointer that is not a multiple of 16 bytes."""
    name, at = next((name, at) for name, at in pointers.items() if at % VECTOR)
    return unsupported(
        checker, name, f"memory aligned to {VECTOR} bytes on a GPU", f"address {at:#x}"
    )


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
        name = f"cache.{side}"
        rows = row_strides(checker, name, getattr(cache, side), checker.dtype(name))
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
    defines: dict[str, object] = {"codec_header": f"<codecs/{quant.name.value}.cuh>"}
    if quant.storage is None:
        defines["storage"] = CTYPE[storage]
    if quant.needs_paged_scales:
        defines["scale"] = CTYPE[scale_dtype]
    return defines


def cache_defines(checker: "Checker", cache: "LayerCache") -> dict[str, object]:
    """`codec_defines` of a layer; refuses what the device has no conversions for."""
    storage = cache.spec.storage_dtype(cache.layer_id)
    least, sm = _LEAST_SM.get(storage, MIN_SM), jit.device_facts(device_index(checker)).sm
    if sm < least:
        raise unsupported(checker, "device", f"sm_{least} or newer for {storage}", f"sm_{sm}")
    return codec_defines(cache.quant, storage, cache.spec.scale_dtype)


def static_defines(checker: "Checker", cache: "LayerCache", direction: str) -> dict[str, object]:
    """Constants of the static arrays that a kernel reads: dtype, per head or per channel.

    Args:
        checker: the checked call.
        cache: the layer.
        direction: `quant` or `dequant`.
    """
    names = [name for name in static_names(cache.quant, direction) if name is not None]
    static = cache.static
    if static is None:
        return {}
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


def static_names(quant: "QuantSpec", direction: str) -> tuple[str | None, ...]:
    """Fields of `StaticScales` in the order of `StaticPointers`; None where there is none.

    Args:
        quant: the format's row.
        direction: `quant` or `dequant`.
    """
    fields = (f"k_{direction}", f"v_{direction}", "k_zp", "v_zp")
    return tuple(name if name in quant.static_fields else None for name in fields)


STATIC_FIELDS = (launch.POINTER,) * 4


def static_pointers(cache: "LayerCache", names: Sequence[str | None], pointer: Any) -> list[int]:
    """`StaticPointers`: addresses of a layer's static arrays, 0 where there is none."""
    static = cache.static
    return [0 if name is None else pointer(getattr(static, name)) for name in names]


def _spell(strides: Sequence[int]) -> str:
    return f"strides {list(strides)}"
