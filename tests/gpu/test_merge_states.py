# SPDX-License-Identifier: Apache-2.0
"""`merge_states` on a GPU against float64, and the states that hold nothing."""

import math

import numpy as np
import pytest

from fastkv import ops
from fastkv.errors import UnsupportedError
from helpers import gpu, oracle
from helpers.batches import floats
from helpers.compare import assert_close
from helpers.gpu import LIBRARIES, assert_same, fetch, permuted, put

NAN, INF = math.nan, math.inf


def states(seed, dtype="float32", rows=37, heads=6, dim=64, spread=3.0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(2):
        made += [floats(rng, (rows, heads, dim), dtype), floats(rng, (rows, heads), scale=spread)]
    return made


def merge64(given):
    out_a, lse_a, out_b, lse_b = map(oracle.values_of, given)
    lse = np.logaddexp(lse_a, lse_b)
    weights = np.exp(lse_a - lse)[..., None], np.exp(lse_b - lse)[..., None]
    return weights[0] * out_a + weights[1] * out_b, lse


def merged(given, library="torch"):
    out, lse = ops.merge_states(*(put(array, library) for array in given))
    return fetch(out).view(given[0].dtype), fetch(lse)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize(
    ("library", "dtype", "dim"),
    [
        ("torch", "bfloat16", 128),
        ("torch", "float16", 64),
        ("cupy", "float32", 96),
        ("cupy", "float16", 256),
    ],
)
def test_matches_float64(library, dtype, dim, spread):
    given = states(3, dtype, dim=dim, spread=spread)
    out, lse = merged(given, library)
    want, want_lse = merge64(given)
    assert_close(out, want)
    assert_close(lse, want_lse)


@pytest.mark.parametrize("rows", [1, 3, 700])
def test_any_number_of_rows(rows):
    given = states(5, rows=rows, heads=5)
    out, lse = merged(given)
    want, want_lse = merge64(given)
    assert_close(out, want)
    assert_close(lse, want_lse)


@pytest.mark.parametrize("empty", [0, 1])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 3.0])
def test_an_empty_state_is_not_read(empty, garbage):
    given = states(7)
    given[2 * empty][...] = garbage
    given[2 * empty + 1][...] = -INF
    out, lse = merged(given)
    other = 2 * (1 - empty)
    assert_same(out, given[other])
    assert_same(lse, given[other + 1])


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 3.0])
def test_two_empty_states_give_zero_and_minus_infinity(garbage):
    given = states(11)
    for i in (0, 2):
        given[i][2] = garbage
        given[i + 1][2] = -INF
    out, lse = merged(given)
    assert_same(out[2], np.zeros_like(out[2]))
    assert np.isneginf(lse[2]).all()
    assert np.isfinite(np.delete(lse, 2, axis=0)).all()
    assert np.isfinite(out).all()


def test_nan_is_kept_to_its_element_or_row():
    given = states(13)
    given[0][4, 2, 7] = NAN
    given[1][5, 3] = NAN
    out, lse = merged(given)
    want = np.zeros(out.shape, bool)
    want[4, 2, 7] = want[5, 3] = True
    np.testing.assert_array_equal(np.isnan(out), want)
    assert np.argwhere(np.isnan(lse)).tolist() == [[5, 3]]


def test_far_apart_states_do_not_overflow():
    given = states(17)
    given[1][...], given[3][...] = 1000.0, -1000.0
    out, lse = merged(given)
    assert_same(out, given[0])
    assert_same(lse, given[1])


def test_strided_states_are_served():
    given = states(19)
    heads_first = [put(np.ascontiguousarray(given[i].swapaxes(0, 1)), "torch") for i in range(4)]
    views = [permuted(t, (1, 0, 2)[: t.ndim]) for t in heads_first]
    out, lse = ops.merge_states(*views)
    want = merged(given)
    assert_same(out, want[0])
    assert_same(lse, want[1])


def test_states_without_dense_heads_are_refused_by_name():
    given = [put(array, "torch") for array in states(23)]
    wide = put(floats(np.random.default_rng(0), (37, 6, 128)), "torch")
    given[2] = wide[:, :, ::2]
    with pytest.raises(UnsupportedError, match="on a GPU") as error:
        ops.merge_states(*given)
    assert error.value.argument == "out_b"


def test_the_result_is_the_same_at_every_run_and_on_a_stream_of_the_callers():
    given = states(29, "float16")
    want = merged(given)
    for library in LIBRARIES:
        there = [put(array, library) for array in given]
        late = put(np.zeros_like(given[0]), library)
        with gpu.own_stream(library):
            gpu.keep_busy(library)
            late[...] = there[0]
            out, lse = ops.merge_states(late, *there[1:])
        assert_same(out, want[0])
        assert_same(lse, want[1])


def test_a_captured_graph_replays():
    import torch

    given = states(31, "bfloat16")
    there = [put(array, "torch") for array in given]
    want = merged(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.merge_states(*there)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same(out, want[0])
    assert_same(lse, want[1])


def test_no_rows():
    out, lse = merged(states(37, rows=0))
    assert out.shape == (0, 6, 64)
    assert lse.shape == (0, 6)
