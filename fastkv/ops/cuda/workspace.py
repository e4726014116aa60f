# SPDX-License-Identifier: Apache-2.0
"""What a kernel needs beside its arguments: states of split work, and counters of arrivals.

One workspace a stream, since launches of one stream follow each other; a graph capture gets one of
its own, since its replays may run beside the stream's eager calls. Counters are zero between
launches: each kernel leaves them so.
"""

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fastkv.arrays.library import OnDevice

_ARENA_BYTES = 1 << 20
_ALIGNMENT = 256


class Workspace(NamedTuple):
    """Addresses, and what keeps them alive for the length of the call."""

    states: int
    counters: int
    owner: Any


class _Arena:
    """Zeroed memory of one device, handed out in slices that are never taken back."""

    def __init__(self) -> None:
        self.left = 0
        self.at = 0
        self.kept: list[Any] = []

    def take(self, nbytes: int) -> int:
        nbytes = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if nbytes > self.left:
            memory = _zeroed(max(nbytes, _ARENA_BYTES))
            self.kept.append(memory)
            self.at, self.left = memory.ptr, max(nbytes, _ARENA_BYTES)
        at = self.at
        self.at += nbytes
        self.left -= nbytes
        return at


_lock = threading.Lock()
_by_stream: dict[tuple[int, int], tuple[int, int, Workspace]] = {}
_by_capture: dict[tuple[int, int, int, str, int], int] = {}
_arenas: dict[int, _Arena] = {}


def workspace(
    on_device: "OnDevice", library: str, index: int, stream: int, states: int, counters: int
) -> Workspace:
    """The workspace for a launch on a stream.

    Args:
        on_device: the caller's library.
        library: its name.
        index: device.
        stream: handle of the stream.
        states: bytes of states.
        counters: bytes of counters, zero at first.
    """
    if _is_capturing(stream):
        return _captured(on_device, library, index, stream, states, counters)
    found = _by_stream.get((index, stream))
    if found is None or found[0] < states or found[1] < counters:
        found = _grow(index, stream, states, counters)
    return found[2]


def _grow(index: int, stream: int, states: int, counters: int) -> tuple[int, int, Workspace]:
    """New memory for the largest states and the largest counters that were asked for so far."""
    with _lock:
        old = _by_stream.get((index, stream))
        kept = None  # what a launch before this one may still use
        if old is not None:
            states, counters, kept = max(states, old[0]), max(counters, old[1]), old[2].owner
        counters = -(-counters // _ALIGNMENT) * _ALIGNMENT
        with _device(index):
            memory = _zeroed(states + counters)
        space = Workspace(memory.ptr + counters, memory.ptr, (memory, kept))
        made = _by_stream[index, stream] = (states, counters, space)
        return made


def _captured(
    on_device: "OnDevice", library: str, index: int, stream: int, states: int, counters: int
) -> Workspace:
    """PyTorch's allocator keeps what is allocated during a capture for the graph alone."""
    at = _slice(index, stream, "counters", counters)
    if library == "torch":
        owner = on_device.maker((states,), "uint8", index)()
        return Workspace(on_device.pointer(owner), at, owner)
    return Workspace(_slice(index, stream, "states", states), at, None)


def _slice(index: int, stream: int, kind: str, nbytes: int) -> int:
    """Memory of one capture on one stream: branches of a capture may run side by side."""
    key = (index, stream, _capture_id(stream), kind, nbytes)
    with _lock:
        found = _by_capture.get(key)
        if found is None:
            with _device(index), _Relaxed():
                arena = _arenas.setdefault(index, _Arena())
                found = _by_capture[key] = arena.take(nbytes)
        return found


def _zeroed(nbytes: int) -> Any:
    """Memory of the current device, zero before anything later on any stream."""
    import cupy

    memory = cupy.cuda.Memory(nbytes)  # past CuPy's pool, whose memory follows a stream
    side = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.memsetAsync(memory.ptr, 0, nbytes, side.ptr)
    side.synchronize()
    return memory


class _Relaxed:
    """Lets this thread allocate while one of its streams is captured."""

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *_: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        from cuda.bindings import driver

        mode = getattr(self, "_mode", driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        _, self._mode = driver.cuThreadExchangeStreamCaptureMode(mode)


def _device(index: int) -> Any:
    import cupy

    return cupy.cuda.Device(index)


def _is_capturing(stream: int) -> bool:
    global _is_capturing  # noqa: PLW0603 - binds itself to CuPy's function at the first call
    from cupy.cuda.runtime import streamIsCapturing

    _is_capturing = streamIsCapturing
    return bool(streamIsCapturing(stream))


def _capture_id(stream: int) -> int:
    from cuda.bindings import driver

    return int(driver.cuStreamGetCaptureInfo(stream)[2])
