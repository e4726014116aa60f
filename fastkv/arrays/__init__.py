# SPDX-License-Identifier: Apache-2.0
"""The four array libraries, taken by their own protocols and without a copy.

A library is imported only when one of its tensors, or its name, comes along; each has a module
here of its name. Views go through NumPy's array interface with the tensor's pointer, shape and
strides, so that bfloat16 and float8 (which NumPy's DLPack import refuses) and strided tensors work
alike, and a write through the view is a write into the caller's tensor.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

from fastkv.arrays.library import ArrayInfo, Library, OnDevice, gpu_index, numpy_dtype
from fastkv.dtypes import ITEMSIZE
from fastkv.errors import DtypeError, PlacementError, ReadOnlyError, unknown_name
from fastkv.optional import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "LIBRARIES",
    "ArrayInfo",
    "LibraryName",
    "convert",
    "describe",
    "from_host",
    "gpu_index",
    "likeness",
    "numpy_dtype",
    "on_device",
    "signature",
    "to_host",
    "zeros",
    "zeros_like",
]

LibraryName = Literal["numpy", "torch", "paddle", "cupy"]
LIBRARIES: tuple[str, ...] = get_args(LibraryName)

_INSTALL = {
    "numpy": "pip install fastkv",
    "torch": "pip install 'fastkv[torch]'",
    "paddle": "pip install 'fastkv[paddle]'",
    "cupy": "pip install 'fastkv[cuda12]' (or cuda13)",
}


def describe(array: Any, op: str = "describe", argument: str = "array") -> ArrayInfo:
    """Library, device, dtype and shape of a tensor.

    Raises:
        DtypeError: `array` is no tensor of NumPy, PyTorch, Paddle or CuPy.
        UnsupportedError: its elements do not lie in memory at strides: a sparse tensor, say.
    """
    return _library_of(array, op, argument).describe(array, op, argument)


def to_host(array: Any) -> "NDArray[Any]":
    """A NumPy view of a CPU tensor: no copy, writes reach the caller's tensor.

    bfloat16 and float8 come as ml_dtypes' types.

    Raises:
        PlacementError: the tensor is not on the CPU.
        DtypeError: NumPy and ml_dtypes lack its dtype, or it is not in the machine's byte order.
        UnsupportedError: as in `describe`.
    """
    library = _library_of(array, "to_host", "array")
    info = library.describe(array, "to_host", "array")
    if info.device != "cpu":
        raise PlacementError("to_host", "array", expected="a CPU tensor", got=info.device)
    return library.to_host(array, info)


def from_host(array: "NDArray[Any]", library: str, device: str = "cpu") -> Any:
    """A tensor of a library over a NumPy array's memory: no copy on the CPU, one to a device.

    Raises:
        ReadOnlyError: the array is read-only, which PyTorch and Paddle cannot express.
        DtypeError: it is not in the machine's byte order.
    """
    host = to_host(array)
    if not host.flags.writeable:
        raise ReadOnlyError("from_host", "array", expected="writeable memory", got="read-only")
    return _named(library, "from_host").from_host(host, device)


def zeros(library: str, shape: tuple[int, ...], dtype: str, device: str = "cpu") -> Any:
    """A zero-filled tensor of a library, by the name of its dtype."""
    if dtype not in ITEMSIZE:
        raise unknown_name("zeros", "dtype", dtype, ITEMSIZE)
    return _named(library, "zeros").zeros(shape, dtype, device)


def zeros_like(info: ArrayInfo, shape: tuple[int, ...], dtype: str) -> Any:
    """A zero-filled tensor beside another: same library, same device."""
    return _load(info.library).zeros(shape, dtype, info.device)


def convert(array: Any, library: str, device: str = "cpu") -> Any:
    """A copy of a CPU tensor in another library, on a device."""
    return from_host(to_host(array).copy(), library, device)


def signature(array: Any) -> Any:
    """A hashable of a GPU tensor's metadata; None for anything else."""
    library = _by_type.get(type(array))
    if library is None or library.on_device is None:
        return None  # never met: `describe` has the errors
    return library.on_device.signature(array)


def likeness(tensors: Sequence[Any]) -> Callable[..., bool] | None:
    """What tells in one call whether other GPU tensors have the metadata of these, in order.

    It is true of no two tensors of different signatures.

    Args:
        tensors: with a signature each.

    Returns:
        None where the tensors' library has no such test, or they are of several.
    """
    libraries = {_by_type[type(tensor)].on_device for tensor in tensors}
    found = libraries.pop() if len(libraries) == 1 else None
    return None if found is None or found.likeness is None else found.likeness(tensors)


def on_device(library: str) -> OnDevice:
    """How a library's GPU tensors are launched on."""
    found = _load(library).on_device
    assert found is not None, "NumPy has no GPU tensors"
    return found


@cache
def _load(name: str) -> Library:
    require(name, f"A {name} tensor", _INSTALL[name])
    library: Library = import_module(f"fastkv.arrays.{name}").LIBRARY
    return library


def _named(name: str, op: str) -> Library:
    if name not in LIBRARIES:
        raise unknown_name(op, "library", name, LIBRARIES)
    return _load(name)


_by_type: dict[type, Library] = {}  # what _library_of found, one entry per tensor class


def _library_of(array: Any, op: str, argument: str) -> Library:
    found = _by_type.get(type(array))
    if found is None:
        for base in type(array).__mro__:
            root = base.__module__.partition(".")[0]
            if root in LIBRARIES and hasattr(array, "shape") and hasattr(array, "dtype"):
                found = _by_type[type(array)] = _load(root)
                break
        else:
            raise DtypeError(
                op,
                argument,
                expected="a tensor of NumPy, PyTorch, Paddle or CuPy",
                got=f"{type(array).__module__}.{type(array).__qualname__}",
            )
    return found
