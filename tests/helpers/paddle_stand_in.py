# SPDX-License-Identifier: Apache-2.0
"""A `paddle` that is none: tensors that speak Paddle's GPU protocol over torch's memory.

What fastkv asks of a Paddle tensor, in Paddle's spelling, traps included: shape and strides are
lists, a dtype is an enumeration's member, and `__cuda_array_interface__` calls bfloat16 float16
and fails for float8. For a process of its own: `install()` takes the place of the real library.
"""

import sys
from types import ModuleType, SimpleNamespace

import torch

_NUMBERS = ("bool", "uint8", "int8", "int16", "int32", "int64", "float32", "bfloat16", "float16")
_NAMES = (*_NUMBERS, "float8_e4m3fn")


class DataType:
    """A member of Paddle's enumeration of dtypes."""

    def __init__(self, name):
        self.name, self.value = name, _NAMES.index(name)

    def __str__(self):
        return f"paddle.{self.name}"

    def __hash__(self):
        raise AssertionError("hashing a Paddle dtype is slow")


class Place:
    """Where a tensor lives."""

    def __init__(self, index):
        self.index = index

    def is_gpu_place(self):
        return True

    def gpu_device_id(self):
        return self.index

    def __str__(self):
        return f"Place(gpu:{self.index})"


class Tensor:
    """A Paddle tensor over a torch tensor."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        raise AssertionError("nobody asks for the length")

    def __array__(self, *_, **__):
        raise AssertionError("values were read")

    shape = property(lambda self: list(self.inner.shape))
    strides = property(lambda self: list(self.inner.stride()))
    dtype = property(lambda self: DataType(str(self.inner.dtype).removeprefix("torch.")))
    place = property(lambda self: Place(self.inner.device.index))

    def data_ptr(self):
        return self.inner.data_ptr()

    def is_dense(self):
        return True

    def is_contiguous(self):
        return self.inner.is_contiguous()

    def view(self, name):
        return Tensor(self.inner.view(getattr(torch, name)))

    @property
    def __cuda_array_interface__(self):
        typestr = {"float16": "<f2", "bfloat16": "<f2", "float32": "<f4", "int32": "<i4"}
        return {
            "typestr": typestr[self.dtype.name],
            "data": (self.data_ptr(), False),
            "shape": tuple(self.shape),
            "version": 2,
        }


def install():
    """Put the stand-in into `sys.modules`; returns its calls, a list that `empty` adds to."""
    calls = []
    paddle = ModuleType("paddle")
    paddle.__path__ = []
    Tensor.__module__ = "paddle"
    paddle.Tensor = Tensor
    paddle.version = SimpleNamespace(full_version="3.3.1")
    paddle.CUDAPlace = Place

    def empty(shape, dtype, device):
        calls.append((tuple(shape), dtype))
        return Tensor(
            torch.empty(shape, dtype=getattr(torch, dtype), device=f"cuda:{device.index}")
        )

    def current_stream(place):
        handle = torch.cuda.current_stream(place.index).cuda_stream
        return SimpleNamespace(stream_base=SimpleNamespace(cuda_stream=handle))

    paddle.empty = empty
    paddle.device = SimpleNamespace(current_stream=current_stream)
    utils, dlpack = ModuleType("paddle.utils"), ModuleType("paddle.utils.dlpack")
    utils.__path__ = []

    def from_dlpack(_):
        raise AssertionError("a GPU tensor goes by its pointer")

    dlpack.from_dlpack = from_dlpack
    sys.modules |= {"paddle": paddle, "paddle.utils": utils, "paddle.utils.dlpack": dlpack}
    return calls
