# SPDX-License-Identifier: Apache-2.0
"""One launch: parameters packed into one struct, through the driver's extended launch.

CuPy's own launch costs 9 microseconds and cannot ask for programmatic dependent launch, which
lets a kernel's start overlap the end of the one before it. Every kernel here waits
(`griddepcontrol.wait`) before it touches memory that another kernel may have written.
"""

import ctypes
import struct
import threading
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

from fastkv.errors import FastKVError
from fastkv.ops.cuda import jit
from fastkv.optional import require

# Of one field of a kernel's parameter struct: as `struct` packs it.
POINTER = "P"  # a third faster than "Q"
INT64 = "q"
INT32 = "i"
FLOAT = "f"


class LaunchError(FastKVError, RuntimeError):
    """The driver refused a launch."""


class Kernel:
    """A specialization on a device, ready to launch; `index` is the device.

    The parameter struct's fields must be in an order that needs no padding (8-byte fields before
    4-byte ones); the kernel asserts the size, which it gets as `FASTKV_PARAMS_BYTES`.

    Args:
        what: kernel and constants, without `FASTKV_PARAMS_BYTES`.
        index: device.
        fields: the parameter struct's fields, in order.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
    """

    def __init__(
        self,
        what: jit.Specialization,
        index: int,
        fields: tuple[str, ...],
        threads: int,
        shared: int = 0,
    ) -> None:
        self.index = index
        self._struct = _layout(fields)
        self._what = what
        self._function = jit.function(completed(what, fields), index)
        if shared > 48 * 1024:
            self._function.max_dynamic_shared_size_bytes = shared
        self._driver = _driver()
        self._launch = self._driver.cuLaunchKernelEx
        self._handle = self._driver.CUfunction(self._function.kernel.ptr)
        self._shape = (threads, shared)
        self._local = threading.local()
        self._device = _device(index)

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return int(self._function.num_regs)

    @property
    def local_bytes(self) -> int:
        """Bytes of local memory of a thread: spilled registers, if any."""
        return int(self._function.local_size_bytes)

    @cached_property
    def resident_blocks(self) -> int:
        """How many blocks run on the device at once."""
        threads, shared = self._shape
        error, blocks = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            self._handle, threads, shared
        )
        _check(error, self._what.kernel)
        return int(blocks) * jit.device_facts(self.index).multiprocessors

    def launch(self, stream: int, grid: int, *values: float | bytes) -> None:
        """Launch `grid` blocks on a stream of the kernel's device."""
        try:
            slot = self._local.slot
        except AttributeError:
            slot = self._local.slot = self._new_slot()
        buffer, params, config = slot
        self._struct.pack_into(buffer, 0, *values)
        config.gridDimX = grid
        config.hStream = stream
        if _current_device() == self.index:
            (error,) = self._launch(config, self._handle, params, 0)
        else:
            with self._device:
                (error,) = self._launch(config, self._handle, params, 0)
        if error:
            _check(error, self._what.kernel)

    def _new_slot(self) -> tuple[Any, int, Any]:
        """One thread's parameter buffer, the address of the array that points to it, its config."""
        driver, (threads, shared) = self._driver, self._shape
        buffer = ctypes.create_string_buffer(max(1, self._struct.size))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        config = driver.CUlaunchConfig()
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.blockDimX, config.sharedMemBytes = threads, shared
        attribute = driver.CUlaunchAttribute()
        attribute.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
        self._local.keep = pointers
        return buffer, ctypes.addressof(pointers), config


@cache
def kernel(
    what: jit.Specialization, index: int, fields: tuple[str, ...], threads: int, shared: int = 0
) -> Kernel:
    """The one `Kernel` of these arguments: batches of many shapes share it."""
    return Kernel(what, index, fields, threads, shared)


def completed(what: jit.Specialization, fields: Sequence[str]) -> jit.Specialization:
    """With `FASTKV_PARAMS_BYTES`, the size of the parameter struct of these fields."""
    size = (("FASTKV_PARAMS_BYTES", str(_layout(fields).size)),)
    return jit.Specialization(what.kernel, tuple(sorted(what.defines + size)))


def _layout(fields: Sequence[str]) -> struct.Struct:
    return struct.Struct(f"@{''.join(fields)}")


def _check(error: Any, kernel: str) -> None:
    if error:
        raise LaunchError(f"{kernel}: the driver says {error!r}")


def _driver() -> Any:
    require("cuda.bindings", "A CUDA kernel", jit.INSTALL)
    from cuda.bindings import driver

    return driver


def _device(index: int) -> Any:
    import cupy

    return cupy.cuda.Device(index)


def _current_device() -> int:
    global _current_device  # noqa: PLW0603 - binds itself to CuPy's function at the first call
    from cupy.cuda.runtime import getDevice

    _current_device = getDevice
    return int(getDevice())
