# SPDX-License-Identifier: Apache-2.0
"""What each library's module gives, and what they share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkv.errors import DtypeError, PlacementError, UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ArrayInfo(NamedTuple):
    """What a contract may know of a tensor: metadata, never values.

    `writeable` is False for read-only memory, and where two elements share a place.
    """

    library: str
    device: str
    dtype: str
    shape: tuple[int, ...]
    writeable: bool = True


@dataclass(frozen=True, slots=True)
class Library:
    """How one library describes, makes and shares tensors.

    Attributes:
        describe: `(tensor, op, argument)` to its description; the names go into an error.
        zeros: `(shape, dtype, device)` to a zero-filled tensor.
        to_host: a CPU tensor and its description to a NumPy view of it.
        from_host: `(writeable array, device)` to a tensor, over the same memory on the CPU.
        on_device: what launching on a GPU takes; None for a library of the CPU alone.
    """

    describe: Callable[[Any, str, str], ArrayInfo]
    zeros: Callable[[tuple[int, ...], str, str], Any]
    to_host: "Callable[[Any, ArrayInfo], NDArray[Any]]"
    from_host: "Callable[[NDArray[Any], str], Any]"
    on_device: "OnDevice | None" = None


@dataclass(frozen=True, slots=True)
class OnDevice:
    """How a library's GPU tensors are launched on. Each costs a fraction of a microsecond.

    Attributes:
        signature: a tensor to a hashable of all metadata that `describe` and the strides depend
            on; None for a tensor on the CPU.
        pointer: a tensor to its address.
        strides: a tensor to its strides, counted in elements.
        maker: `(shape, dtype, device index)` to what makes uninitialized, dense tensors.
        stream: a device index to the handle of the library's current stream there.
        likeness: GPU tensors to a test that takes as many, and is true only where each has the
            signature of its counterpart; None where the library has none that is faster.
    """

    signature: Callable[[Any], Any]
    pointer: Callable[[Any], int]
    strides: Callable[[Any], tuple[int, ...]]
    maker: Callable[[tuple[int, ...], str, int], Callable[[], Any]]
    stream: Callable[[int], int]
    likeness: Callable[[Sequence[Any]], Callable[..., bool]] | None = None


@cache
def numpy_dtype(name: str) -> Any:
    """The NumPy dtype of a name, ml_dtypes' included."""
    import ml_dtypes
    import numpy as np

    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError as error:
        raise DtypeError(
            "numpy_dtype", "dtype", expected="one that NumPy or ml_dtypes has", got=name
        ) from error


class _Borrowed:
    """Lends a tensor's memory to NumPy, and keeps the tensor alive as long as the view lives."""

    def __init__(self, owner: Any, interface: dict[str, Any]) -> None:
        self.owner = owner
        self.__array_interface__ = interface


def view(array: Any, info: ArrayInfo, pointer: int, strides: tuple[int, ...]) -> "NDArray[Any]":
    """A NumPy view of a tensor's memory; `strides` counts elements."""
    import numpy as np

    dtype = numpy_dtype(info.dtype)
    if 0 in info.shape:
        return np.empty(info.shape, dtype)  # may point to nothing, which NumPy 1 refuses
    interface = {
        "version": 3,
        "typestr": f"<u{dtype.itemsize}",
        "data": (pointer, False),
        "shape": info.shape,
        "strides": tuple(stride * dtype.itemsize for stride in strides),
    }
    return np.asarray(_Borrowed(array, interface)).view(dtype)


def distinct(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether each element has a place of its own: no `expand`, no overlapping windows.

    Sufficient, and met by every slice and transpose of dense memory: by growing stride, each axis
    steps over all that the ones before it reach.
    """
    if 0 in shape:
        return True
    reach = 0
    for stride, n in sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride <= reach:
            return False
        reach += stride * (n - 1)
    return True


def not_strided(op: str, argument: str, got: str, hint: str) -> UnsupportedError:
    """The error for a tensor that pointer, shape and strides do not describe."""
    return UnsupportedError(
        op, argument, expected="a tensor whose elements lie at strides", got=got, hint=hint
    )


@cache
def gpu_index(device: str) -> int | None:
    """N of a description's `cuda:N`; None for a device that is no NVIDIA GPU."""
    return int(device[5:]) if device.startswith("cuda") else None


def cuda_index(op: str, library: str, device: str) -> int:
    """N of `cuda:N`; plain `cuda` is 0."""
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise PlacementError(op, "device", expected=f"cuda:N for {library}", got=device)
    return int(index or 0)
