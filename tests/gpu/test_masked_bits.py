# SPDX-License-Identifier: Apache-2.0
"""`masked_attention` on a GPU against itself: other batches, other runs, graphs; bit for bit."""

import numpy as np
import pytest

from fastkv import ops
from helpers.masked_on_gpu import (
    MIXED,
    OPTIONS,
    assert_agrees,
    assert_same,
    every_case,
    int32,
    make,
    options_of,
    run,
    some_cases,
    with_,
)

# --- bit for bit ------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("option", ["window", "all"])
def test_a_request_is_the_same_in_every_batch(case, option):
    batch = make(case, MIXED)
    options = options_of(batch, OPTIONS[option])
    offsets = options.pop("mask_offsets", None)
    whole = run(batch, mask_offsets=offsets, **options)
    assert_same(run(batch, mask_offsets=offsets, **options), whole)
    count = len(MIXED)
    for order in ([*reversed(range(count))], [4, 1], *([b] for b in range(count))):
        part, own, places = batch.part(order, offsets)
        if not len(places):
            continue
        got = run(part, mask_offsets=own, **options)
        assert_same(got, tuple(x[places] for x in whole))


@every_case
def test_runs_are_the_same_bit_for_bit(case):
    batch = make(case, [(n, n) for n in (63, 129, 1000, 2049, 4097)])
    first = run(batch)
    for _ in range(3):
        assert_same(run(batch), first)


@every_case
def test_causality_as_intervals_is_causality(case):
    batch = make(case, [*MIXED, (257, 600)])
    offsets = np.zeros((len(batch.q), 2), np.int32)
    for rows, keys in batch.requests():
        n, length = rows.stop - rows.start, keys.stop - keys.start
        offsets[rows, 1] = np.maximum(length - n + np.arange(n) + 1, 0)
    as_intervals = run(batch, causal=False, mask_offsets=int32(offsets.tolist()))
    assert_same(as_intervals, run(batch))


# --- graphs -----------------------------------------------------------------------------------

# Rows of three requests and their keys, in 300 rows and 900 keys; the shapes stay.
STEPS = (
    ((0, 1, 1, 4), (0, 1, 1, 9)),
    ((0, 128, 129, 300), (0, 128, 400, 900)),
    ((0, 0, 257, 257), (0, 0, 300, 300)),
    ((2, 66, 130, 258), (5, 700, 764, 892)),
)


@some_cases
@pytest.mark.parametrize("option", ["window", "sinks"])
def test_one_graph_serves_all_lengths(case, option):
    import torch

    first = make(case, [(300, 900)])
    options = options_of(first, OPTIONS[option])
    batches = [with_(first, cu_seqlens_q=rows, cu_seqlens_k=keys) for rows, keys in STEPS]
    sums = {name: int32([0] * 4) for name in first.sums()}

    def call():
        return ops.masked_attention(first.q, first.k, first.v, **sums, **options, return_lse=True)

    call()  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for batch in (*batches, batches[1], batches[0]):
        for name, now in batch.sums().items():
            sums[name].copy_(now)
        for tensor in result:
            tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(result, call())
        assert_agrees(batch, *result, **options)
