# SPDX-License-Identifier: Apache-2.0
"""Counters and states of a stream lie apart, whatever sizes were asked for in whatever order."""

import gc
import itertools
import sys
import weakref
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from fastkv.ops.cuda import workspace as module

SIZES = ((1000, 64), (50, 4096), (4096, 8), (200, 300), (70000, 512), (1, 1))


class Memory:
    """As `cupy.cuda.Memory`: an address, and old content until something is written."""

    made = 0

    def __init__(self, nbytes):
        self.buffer = np.full(nbytes + 512, 0xAB, np.uint8)
        start = -self.buffer.ctypes.data % 512  # CUDA aligns to 512 bytes
        self.content = self.buffer[start : start + nbytes]
        self.ptr = self.content.ctypes.data
        Memory.made += 1


@pytest.fixture
def gpu(monkeypatch):
    """A CuPy of which `workspace` gets memory; returns what asks for a workspace."""
    alive = weakref.WeakSet()

    def memory(nbytes):
        found = Memory(nbytes)
        alive.add(found)
        return found

    def memset(at, value, nbytes, stream):
        owner = next(m for m in alive if m.ptr <= at and at + nbytes <= m.ptr + len(m.content))
        owner.content[at - owner.ptr : at - owner.ptr + nbytes] = value

    stream = SimpleNamespace(ptr=7, synchronize=lambda: None)
    runtime = ModuleType("cupy.cuda.runtime")
    runtime.streamIsCapturing = lambda stream: 0
    runtime.memsetAsync = memset
    cuda = ModuleType("cupy.cuda")
    cuda.runtime, cuda.Memory = runtime, memory
    cuda.Stream = lambda non_blocking: stream
    cuda.Device = lambda index: nullcontext()
    cupy = ModuleType("cupy")
    cupy.cuda = cuda
    for name, fake in (("cupy", cupy), ("cupy.cuda", cuda), ("cupy.cuda.runtime", runtime)):
        monkeypatch.setitem(sys.modules, name, fake)
    # The function binds itself to CuPy's at its first call: undone with the rest.
    monkeypatch.setattr(module, "_is_capturing", module._is_capturing)
    monkeypatch.setattr(module, "_by_stream", {})

    def ask(states, counters, stream=1, index=0):
        return module.workspace(None, "torch", index, stream, states, counters)

    return SimpleNamespace(ask=ask, alive=alive)


def region(gpu, at, nbytes):
    """The bytes at an address, which lie within one live allocation."""
    owners = [m for m in gpu.alive if m.ptr <= at and at + nbytes <= m.ptr + len(m.content)]
    assert len(owners) == 1, f"{nbytes} bytes are not within one allocation"
    return owners[0].content[at - owners[0].ptr : at - owners[0].ptr + nbytes]


@pytest.mark.parametrize("order", list(itertools.permutations(SIZES, 3)), ids=str)
def test_counters_and_states_are_large_enough_and_apart(gpu, order):
    for states, counters in order:
        space = gpu.ask(states, counters)
        region(gpu, space.states, states)
        assert not region(gpu, space.counters, counters).any(), "counters are zero"
        apart = space.counters + counters <= space.states or space.states + states <= space.counters
        assert apart, f"counters at {space.counters}, states at {space.states}"
        region(gpu, space.states, states)[...] = 0xCD  # what a launch leaves behind


@pytest.mark.parametrize("first", SIZES, ids=str)
def test_both_are_aligned(gpu, first):
    space = gpu.ask(*first)
    assert space.states % 256 == 0
    assert space.counters % 256 == 0


def test_smaller_needs_take_the_memory_that_is_there(gpu):
    gpu.ask(1000, 64)
    large = gpu.ask(500, 4096)
    made = Memory.made
    for states, counters in ((1000, 4096), (1000, 64), (1, 1), (500, 4096)):
        assert gpu.ask(states, counters) is large, "the largest of both so far"
    assert Memory.made == made


def test_memory_of_earlier_launches_stays_alive(gpu):
    addresses = [
        gpu.ask(*sizes).counters for sizes in ((100, 8), (1000, 8), (1000, 800), (9000, 1))
    ]
    gc.collect()
    assert len(set(addresses)) == 4
    for at in addresses:
        region(gpu, at, 8)


@pytest.mark.parametrize("other", [{"stream": 2}, {"index": 1}], ids=["stream", "device"])
def test_streams_share_nothing(gpu, other):
    one, two = gpu.ask(1000, 64), gpu.ask(1000, 64, **other)
    assert not {one.states, one.counters} & {two.states, two.counters}
    assert gpu.ask(1000, 64) is one
    assert gpu.ask(1000, 64, **other) is two
