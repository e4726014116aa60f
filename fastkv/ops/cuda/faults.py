# SPDX-License-Identifier: Apache-2.0
"""Faults in the values of a batch, as kernels note them under `FASTKV_CHECK=1`.

Kernels clamp and skip in any case. When asked, they also leave the first fault in one word of
device memory; the launcher then waits for the stream, reads the word and raises. Without the
variable the word's address is 0 and nothing waits. Nor does anything within a graph capture.
"""

import ctypes
import os
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkv.errors import BatchValueError

if TYPE_CHECKING:
    from fastkv.contracts.tensors import Checker

#: Read once, at import.
ENABLED = os.environ.get("FASTKV_CHECK") == "1"


class Fault(NamedTuple):
    """One kind: the argument at fault and what it should be; `{b}` is the request or pair."""

    argument: str
    expected: str


# kernels/common/faults.cuh has the same numbers.
FAULTS = {
    1: Fault("cache_seqlens[{b}] of request {b}", "0 to what its row of block_table has room for"),
    2: Fault("block_table of request {b}", "page ids from -1 to N - 1"),
    3: Fault("rope of request {b}", "tables that reach all positions"),
    4: Fault("cu_seqlens_q at request {b}", "rows of the batch, ascending"),
    5: Fault("cu_seqlens_k of request {b}", "an empty segment, or ascending rows for all its keys"),
    6: Fault("src[{b}]", "-1 to N - 1"),
    7: Fault("dst[{b}]", "-1 to N - 1"),
    8: Fault("mask_offsets of request {b}", "0 <= start <= end <= its keys"),
}


def word(index: int, stream: int) -> int:
    """The address of a zeroed fault word for the next launch on a stream; 0 when not asked for."""
    if not ENABLED or _is_capturing(stream):
        return 0
    at = int(_word(index, stream).data.ptr)
    _runtime().memsetAsync(at, 0, 4, stream)
    return at


def raise_noted(checker: "Checker", at: int, stream: int) -> None:
    """Wait for the stream, and raise what the kernel noted at `at`."""
    runtime, found = _runtime(), ctypes.c_int32()
    runtime.streamSynchronize(stream)
    runtime.memcpy(ctypes.addressof(found), at, 4, runtime.memcpyDeviceToHost)
    if found.value:
        raise error(checker, found.value)


def error(checker: "Checker", noted: int) -> BatchValueError:
    """The exception for a noted word."""
    fault, b = FAULTS[noted >> 24], noted & 0xFFFFFF
    return BatchValueError(
        checker.op,
        fault.argument.format(b=b),
        format=checker.format,
        expected=fault.expected,
        got="a value outside of them, which was skipped",
    )


@cache
def _word(index: int, _: int) -> Any:
    """One int32 for each device and stream."""
    import cupy

    with cupy.cuda.Device(index):
        return cupy.zeros(1, cupy.int32)


def _is_capturing(stream: int) -> bool:
    return bool(_runtime().streamIsCapturing(stream))


def _runtime() -> Any:
    from cupy.cuda import runtime

    return runtime
