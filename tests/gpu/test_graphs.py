# SPDX-License-Identifier: Apache-2.0
"""Each op captured once and replayed while lengths grow: bitwise what eager calls give."""

import numpy as np
import pytest

from helpers.calls import OPS, Call
from helpers.growing import growing_call
from helpers.on_gpu import assign, snapshot, synchronize, tensors_in, to_cpu, to_gpu

every_op = pytest.mark.parametrize("op", OPS)


class Replayed:
    """A call on a GPU, its first state kept, so that each run starts from the same bytes."""

    def __init__(self, op, fmt, library):
        host, self.steps = growing_call(op, fmt)
        self.call = Call(op, {n: to_gpu(a, library) for n, a in host.arguments.items()})
        self.first = [to_cpu(tensor) for tensor in tensors_in(self.call.arguments)]

    def prepare(self, step, result=None):
        """The first state with a step's values in place, and a result that shows if unwritten."""
        for tensor, array in zip(tensors_in(self.call.arguments), self.first, strict=True):
            assign(tensor, array)
        for name, array in self.steps[step].items():
            assign(self.call[name], array)
        for tensor in tensors_in(result):
            assign(tensor, np.full(tuple(tensor.shape), -77, to_cpu(tensor).dtype))
        synchronize()

    def eager(self, step):
        self.prepare(step)
        result = self.call.run()
        synchronize()
        return snapshot([self.call.arguments, result])

    def check(self, replay, result):
        """Each step replayed, growing and then shrinking, equals the eager call."""
        seen = []
        order = [*range(len(self.steps)), 1, 0]
        want = [self.eager(step) for step in range(len(self.steps))]
        for step in order:
            self.prepare(step, result)
            replay()
            synchronize()
            seen.append(snapshot([self.call.arguments, result]))
        for step, got in zip(order, seen, strict=True):
            assert got == want[step], f"step {step}"
        assert len({tuple(got) for got in want}) == len(want), "the steps give different results"


@every_op
@pytest.mark.parametrize("fmt", ["cache_int8", "block_wise_fp8"])
def test_torch_graph(op, fmt):
    import torch

    replayed = Replayed(op, fmt, "torch")
    replayed.eager(0)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = replayed.call.run()
    replayed.check(graph.replay, result)


@every_op
def test_cupy_graph(op):
    import cupy

    replayed = Replayed(op, "cache_int4_zp", "cupy")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        replayed.eager(0)
        stream.begin_capture()
        result = replayed.call.run()
        graph = stream.end_capture()
    replayed.check(lambda: graph.launch(stream), result)


@every_op
def test_a_second_graph_of_the_same_call(op):
    import torch

    # Two captures alive at once share nothing that either writes.
    one, two = (Replayed(op, "cache_int8", "torch") for _ in range(2))
    captured = []
    for replayed in (one, two):
        replayed.eager(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = replayed.call.run()
        captured.append((replayed, graph, result))
    for replayed, graph, result in (*captured, captured[0]):
        replayed.check(graph.replay, result)
