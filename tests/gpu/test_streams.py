# SPDX-License-Identifier: Apache-2.0
"""The caller's stream and the tensors' device: others, two at once, from two threads."""

import threading
from itertools import product

import numpy as np
import pytest

from fastkv import arrays
from helpers.calls import OPS, Call
from helpers.growing import growing_call
from helpers.on_gpu import (
    assign,
    gpu_call,
    gpu_devices,
    snapshot,
    synchronize,
    tensors_in,
    to_cpu,
    to_gpu,
)

DEVICES = gpu_devices()
every_op = pytest.mark.parametrize("op", OPS)
every_library = pytest.mark.parametrize("library", ["torch", "cupy"])


class Work:
    """A call at its last, longest step, and device copies of all that it starts from."""

    def __init__(self, op, library, seed=0, device=DEVICES[0]):
        host, steps = growing_call(op, "cache_int8", seed=seed)
        given = host.arguments | steps[-1]
        self.call = Call(op, {n: to_gpu(a, library, device) for n, a in given.items()})
        self.tensors = tensors_in(self.call.arguments)
        self.first = [to_gpu(to_cpu(tensor), library, device) for tensor in self.tensors]
        synchronize(device)

    def run(self):
        """Start from the same bytes, and run; all queued on the current stream, nothing waits."""
        for tensor, copy in zip(self.tensors, self.first, strict=True):
            tensor[...] = copy
        return self.call.run()

    def zero(self):
        for tensor in self.tensors:
            assign(tensor, np.zeros_like(to_cpu(tensor)))

    def results(self, result):
        """The bytes of all arguments and results, when everything is done."""
        synchronize(arrays.describe(self.tensors[0]).device)
        return snapshot([self.call.arguments, result])


def new_stream(library):
    """The context that makes a stream current which does not wait for the default one."""
    if library == "torch":
        import torch

        return torch.cuda.stream(torch.cuda.Stream())
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def spin(library, cycles=200_000_000):
    """Occupy the current stream for about 0.1 s."""
    if library == "torch":
        import torch

        torch.cuda._sleep(cycles)
        return
    import cupy

    code = """
    extern "C" __global__ void spin(long long cycles) {
      const long long start = clock64();
      while (clock64() - start < cycles) {}
    }
    """
    cupy.RawKernel(code, "spin")((1,), (1,), (np.int64(cycles),))


def on_device(library, device):
    """The context that makes a device current."""
    if library == "torch":
        import torch

        return torch.cuda.device(device)
    import cupy

    return cupy.cuda.Device(int(device[5:]))


@every_op
@every_library
def test_an_op_runs_on_the_current_stream(op, library):
    work = Work(op, library)
    want = work.results(work.run())
    work.zero()  # what an op that does not wait its turn would read
    synchronize()
    with new_stream(library):
        spin(library)
        result = work.run()
    assert work.results(result) == want


def test_calls_of_different_shapes_follow_each_other_on_one_stream():
    # They share one workspace: large after small, small after large, many blocks after few.
    shapes = [(64, 1, (1500, 40)), (256, 4, (30, 3)), (64, 4, (90, 2100)), (256, 1, (1300, 0))]
    calls = [
        gpu_call("paged_attention", "cache_int8", head_dim=dim, group=group, cached=cached)
        for dim, group, cached in shapes
    ]
    want = []
    for call in calls:
        call["window"] = None  # every key counts
        with new_stream("torch"):  # a workspace that no other call has used
            result = call.run()
        synchronize()
        want.append(snapshot(result))
    stream = new_stream("torch")
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)):
        with stream:
            results = {i: calls[i].run() for i in order}
        synchronize()
        assert {i: snapshot(result) for i, result in results.items()} == dict(enumerate(want))


@every_op
@every_library
def test_two_streams_at_once(op, library):
    works = [Work(op, library, seed) for seed in (1, 2)]
    want = [work.results(work.run()) for work in works]
    assert want[0] != want[1]
    streams = [new_stream(library) for _ in works]
    results = [None, None]
    for _ in range(20):
        for i, work in enumerate(works):
            with streams[i]:
                results[i] = work.run()
    for work, result, expected in zip(works, results, want, strict=True):
        assert work.results(result) == expected


@every_op
@every_library
def test_two_threads_at_once(op, library):
    works = [Work(op, library, seed) for seed in (3, 4)]
    want = [work.results(work.run()) for work in works]
    gate, got, failed = threading.Barrier(2), [None, None], []

    def serve(i):
        try:
            with new_stream(library):
                gate.wait(timeout=60)
                for _ in range(50):
                    result = works[i].run()
            got[i] = works[i].results(result)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failed
    assert got == want


@every_op
@every_library
def test_a_first_call_from_two_threads(op, library):
    # A signature that nobody has met yet: contract, compilation and workspace are made by both.
    works = [Work(op, library, seed=5) for _ in range(2)]
    gate, got = threading.Barrier(2), [None, None]

    def serve(i):
        with new_stream(library):
            gate.wait(timeout=60)
            got[i] = works[i].results(works[i].run())

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert got[0] is not None
    assert got[0] == got[1]


@every_op
@every_library
@pytest.mark.parametrize(("tensors", "current"), list(product(DEVICES, DEVICES)), ids=str)
def test_a_call_runs_where_its_tensors_live(op, library, tensors, current):
    want = (first := Work(op, library, seed=6)).results(first.run())
    work = Work(op, library, seed=6, device=tensors)
    with on_device(library, current):
        result = work.call.run()
    assert work.results(result) == want
    assert {arrays.describe(tensor).device for tensor in tensors_in(result)} <= {tensors}
