# SPDX-License-Identifier: Apache-2.0
"""The four array libraries, taken by their own protocols and without a copy.

A library is imported only when one of its tensors, or its name, comes along. Views go through
NumPy's array interface with the tensor's pointer, shape and strides, so that bfloat16 and float8
(which NumPy's DLPack import refuses) and strided tensors work alike, and a write through the view
is a write into the caller's tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from fastkv.dtypes import ITEMSIZE
from fastkv.errors import DtypeError, MissingDependencyError, PlacementError, unknown_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

LibraryName = Literal["numpy", "torch", "paddle", "cupy"]
LIBRARIES: tuple[str, ...] = get_args(LibraryName)

_INSTALL = {
    "torch": "pip install 'fastkv[torch]'",
    "paddle": "pip install 'fastkv[paddle]'",
    "cupy": "pip install 'fastkv[cuda12]' (or cuda13)",
}


class ArrayInfo(NamedTuple):
    """What a contract may know of a tensor: metadata, never values."""

    library: str
    device: str
    dtype: str
    shape: tuple[int, ...]
    writeable: bool = True


@dataclass(frozen=True, slots=True)
class _Library:
    """How one library describes and makes tensors."""

    describe: Callable[[Any], ArrayInfo]
    zeros: Callable[[tuple[int, ...], str, str], Any]
    host_layout: Callable[[Any], tuple[int, tuple[int, ...]]]  # pointer, strides in elements
    from_host: Callable[["NDArray[Any]", str], Any]


def describe(array: Any, op: str = "describe", argument: str = "array") -> ArrayInfo:
    """Library, device, dtype and shape of a tensor.

    Raises:
        DtypeError: `array` is no tensor of NumPy, PyTorch, Paddle or CuPy.
    """
    return _library_of(array, op, argument).describe(array)


def to_host(array: Any) -> "NDArray[Any]":
    """A NumPy view of a CPU tensor: no copy, writes reach the caller's tensor.

    bfloat16 and float8 come as ml_dtypes' types.

    Raises:
        PlacementError: the tensor is not on the CPU.
    """
    library = _library_of(array, "to_host", "array")
    info = library.describe(array)
    if info.device != "cpu":
        raise PlacementError("to_host", "array", expected="a CPU tensor", got=info.device)
    if info.library == "numpy":
        return array  # type: ignore[no-any-return]
    return _view(array, info, *library.host_layout(array))


def zeros(library: str, shape: tuple[int, ...], dtype: str, device: str = "cpu") -> Any:
    """A zero-filled tensor of a library, by the name of its dtype."""
    return _library(library, "zeros").zeros(shape, dtype, device)


def zeros_like(info: ArrayInfo, shape: tuple[int, ...], dtype: str) -> Any:
    """A zero-filled tensor beside another: same library, same device."""
    return _LOADERS[info.library]().zeros(shape, dtype, info.device)


def convert(array: Any, library: str, device: str = "cpu") -> Any:
    """A copy of a CPU tensor in another library, on a device."""
    return _library(library, "convert").from_host(to_host(array).copy(), device)


def numpy_dtype(name: str) -> Any:
    """The NumPy dtype of a name, ml_dtypes' included."""
    import ml_dtypes
    import numpy as np

    extended = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
    return np.dtype(extended.get(name, name))


def _library(name: str, op: str) -> _Library:
    if name not in _LOADERS:
        raise unknown_name(op, "library", name, LIBRARIES)
    return _LOADERS[name]()


_by_type: dict[type, _Library] = {}  # what _library_of found, one entry per tensor class


def _library_of(array: Any, op: str, argument: str) -> _Library:
    found = _by_type.get(type(array))
    if found is None:
        for base in type(array).__mro__:
            root = base.__module__.partition(".")[0]
            if root in _LOADERS and hasattr(array, "shape") and hasattr(array, "dtype"):
                found = _by_type[type(array)] = _LOADERS[root]()
                break
        else:
            raise DtypeError(
                op,
                argument,
                expected="a tensor of NumPy, PyTorch, Paddle or CuPy",
                got=f"{type(array).__module__}.{type(array).__qualname__}",
            )
    return found


class _Borrowed:
    """Lends a tensor's memory to NumPy, and keeps the tensor alive as long as the view lives."""

    def __init__(self, owner: Any, interface: dict[str, Any]) -> None:
        self.owner = owner
        self.__array_interface__ = interface


def _view(array: Any, info: ArrayInfo, pointer: int, strides: tuple[int, ...]) -> "NDArray[Any]":
    import numpy as np

    dtype = numpy_dtype(info.dtype)
    if 0 in info.shape:
        return np.empty(info.shape, dtype)  # an empty tensor may have no memory to point to
    interface = {
        "version": 3,
        "typestr": f"<u{dtype.itemsize}",
        "data": (pointer, False),
        "shape": info.shape,
        "strides": tuple(stride * dtype.itemsize for stride in strides),
    }
    return np.asarray(_Borrowed(array, interface)).view(dtype)


def _numpy() -> _Library:
    import numpy as np

    def describe_(array: Any) -> ArrayInfo:
        dtype = array.dtype
        name = dtype.name if dtype.isnative else dtype.str
        return ArrayInfo("numpy", "cpu", name, array.shape, array.flags.writeable)

    def zeros_(shape: tuple[int, ...], dtype: str, device: str) -> Any:
        if device != "cpu":
            raise PlacementError("zeros", "device", expected="cpu for numpy", got=device)
        return np.zeros(shape, numpy_dtype(dtype))

    def layout(array: Any) -> tuple[int, tuple[int, ...]]:
        return array.ctypes.data, tuple(s // array.itemsize for s in array.strides)

    return _Library(describe_, zeros_, layout, lambda host, _: host)


def _torch() -> _Library:
    torch = _import("torch")

    def describe_(array: Any) -> ArrayInfo:
        return ArrayInfo("torch", str(array.device), str(array.dtype)[6:], tuple(array.shape))

    def zeros_(shape: tuple[int, ...], dtype: str, device: str) -> Any:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)

    def from_host(host: "NDArray[Any]", device: str) -> Any:
        raw = torch.from_numpy(host.view(f"u{host.itemsize}"))
        return raw.view(getattr(torch, host.dtype.name)).to(device)

    return _Library(describe_, zeros_, lambda t: (t.data_ptr(), t.stride()), from_host)


def _paddle() -> _Library:
    paddle = _import("paddle")

    def place(device: str) -> Any:
        kind, _, index = device.partition(":")
        return paddle.CPUPlace() if kind == "cpu" else paddle.CUDAPlace(int(index or 0))

    def describe_(array: Any) -> ArrayInfo:
        text = str(array.place)[6:-1]  # "Place(cpu)", "Place(gpu:0)"
        dtype = str(array.dtype).rpartition(".")[2]
        return ArrayInfo("paddle", text.replace("gpu", "cuda"), dtype, tuple(array.shape))

    def zeros_(shape: tuple[int, ...], dtype: str, device: str) -> Any:
        # Paddle fills no float8; zero bytes are zero in every dtype that fastkv has.
        raw = _PADDLE_RAW[ITEMSIZE[dtype]]
        filled = paddle.zeros(list(shape), dtype=raw, device=place(device))
        return filled if dtype == raw else filled.view(dtype)

    def from_host(host: "NDArray[Any]", device: str) -> Any:
        raw = _PADDLE_RAW[host.itemsize]
        moved = paddle.to_tensor(host.view(raw), place=place(device))
        return moved if host.dtype.name == raw else moved.view(host.dtype.name)

    return _Library(describe_, zeros_, lambda t: (t.data_ptr(), tuple(t.strides)), from_host)


_PADDLE_RAW = {1: "uint8", 2: "int16", 4: "float32"}


def _cupy() -> _Library:
    cupy = _import("cupy")

    def describe_(array: Any) -> ArrayInfo:
        return ArrayInfo("cupy", f"cuda:{array.device.id}", array.dtype.name, array.shape)

    def zeros_(shape: tuple[int, ...], dtype: str, device: str) -> Any:
        with cupy.cuda.Device(int(device.partition(":")[2] or 0)):
            return cupy.zeros(shape, dtype)

    def layout(array: Any) -> tuple[int, tuple[int, ...]]:
        return array.data.ptr, tuple(s // array.itemsize for s in array.strides)

    def from_host(host: "NDArray[Any]", device: str) -> Any:
        with cupy.cuda.Device(int(device.partition(":")[2] or 0)):
            return cupy.asarray(host)

    return _Library(describe_, zeros_, layout, from_host)


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"A {name} tensor", name, _INSTALL[name]) from error


def _once(load: Callable[[], _Library]) -> Callable[[], _Library]:
    """Build a library's entry at its first use."""
    made: list[_Library] = []

    def get() -> _Library:
        if not made:
            made.append(load())
        return made[0]

    return get


_LOADERS: dict[str, Callable[[], _Library]] = {
    "numpy": _once(_numpy),
    "torch": _once(_torch),
    "paddle": _once(_paddle),
    "cupy": _once(_cupy),
}
