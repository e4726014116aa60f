# SPDX-License-Identifier: Apache-2.0
"""`masked_attention` on a GPU against float64."""

import numpy as np
import pytest

from fastkv import ops
from helpers.gpu import fetch, put
from helpers.masked_on_gpu import (
    CASES,
    MIXED,
    OPTIONS,
    assert_agrees,
    assert_lse,
    assert_right,
    assert_same,
    attended,
    every_case,
    int32,
    intervals,
    make,
    normal,
    options_of,
    run,
    same_for_all,
    some_cases,
    with_,
)

either = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])

# Around the edges of tiles of 64 and 128 rows and keys, and many of them.
EDGES = (1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 1000, 2049, 4097)
BATCHES = {
    "edges": [(n, n) for n in EDGES],
    "longer by 0 to 255": [(1 + 37 * i % 131, 1 + 37 * i % 131 + i) for i in range(256)],
    "few rows of many keys": [(1, 4097), (3, 1000), (130, 2049), (64, 640), (1, 1), (2, 129)],
    "more rows than keys": [(5, 3), (200, 70), (130, 129), (300, 1), (257, 128), (2, 0), (129, 0)],
    "empty": [(0, 0), (7, 7), (0, 130), (0, 0), (128, 128), (3, 0), (0, 5)],
}


@either
@every_case
@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES)
def test_lengths_agree_with_float64(requests, case, causal):
    assert_right(make(case, requests), causal=causal)


@every_case
@pytest.mark.parametrize("option", OPTIONS)
def test_options_agree_with_float64(option, case):
    batch = make(case, MIXED)
    assert_right(batch, **options_of(batch, OPTIONS[option]))


@some_cases
def test_intervals_over_long_requests_agree_with_float64(case):
    batch = make(case, [(2049, 4097), (1, 3000), (515, 515)])
    assert_right(batch, mask_offsets=intervals(batch, seed=8))
    assert_right(batch, causal=False, mask_offsets=intervals(batch, seed=9), soft_cap=5.0)


@some_cases
@pytest.mark.parametrize(
    "of",
    [
        lambda n: (max(0, n - 10), n),  # all tiles of keys but the last are masked
        lambda n: (0, min(n, 5)),  # all but the first
        lambda n: (n // 2, min(n, n // 2 + 1)),  # all but one key
        lambda n: (min(n, 128), min(n, 256)),  # one whole tile
    ],
    ids=["last", "first", "one", "tile"],
)
def test_whole_tiles_of_keys_are_masked(case, of):
    batch = make(case, [(150, 1000), (3, 2049), (129, 129), (1, 400)])
    assert_right(batch, causal=False, mask_offsets=same_for_all(batch, of))
    assert_right(batch, mask_offsets=same_for_all(batch, of), sinks=normal(1, batch.q.shape[1]))


@some_cases
@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_that_see_no_key_are_zero(case, with_sinks):
    batch = make(case, [(130, 700), (1, 1), (64, 64)])
    sinks = normal(1, batch.q.shape[1]) if with_sinks else None
    nothing = same_for_all(batch, lambda n: (n // 2, n // 2))
    out, lse = run(batch, mask_offsets=nothing, sinks=sinks)
    assert not out.any()
    assert (lse == float("-inf")).all()


@some_cases
def test_rows_that_see_nothing_stand_between_others(case):
    # Every third row of a tile: its maximum stays -inf while its neighbours' grow.
    batch = make(case, [(384, 900)])
    offsets = same_for_all(batch, lambda n: (0, n))
    offsets[::3] = 450
    out, lse = assert_right(batch, mask_offsets=offsets)
    assert not out[::3].any()
    assert (lse[::3] == float("-inf")).all()


def test_many_requests_agree_with_float64():
    # More than a warp walks at once, many of them empty.
    rng = np.random.default_rng(4)
    requests = list(zip(rng.integers(0, 3, 700), rng.integers(0, 60, 700), strict=True))
    assert_right(make(CASES[0], [tuple(map(int, pair)) for pair in requests]))


def test_lse_is_written_only_where_it_is_asked_for():
    batch = make(CASES[0], MIXED)
    out, lse = run(batch)
    alone = ops.masked_attention(batch.q, batch.k, batch.v, **batch.sums())
    assert_same((alone, lse), (out, lse))


def test_cupy_arrays_are_served():
    batch = make(CASES[1], MIXED)
    options = options_of(batch, OPTIONS["all"])
    arrays = {
        name: put(tensor.cpu().numpy(), "cupy")
        for name, tensor in {"q": batch.q, "k": batch.k, "v": batch.v, **batch.sums()}.items()
    }
    data = [arrays.pop(name) for name in "qkv"]
    own = {
        name: put(value.cpu().numpy(), "cupy") if hasattr(value, "cpu") else value
        for name, value in options.items()
    }
    found = ops.masked_attention(*data, **arrays, **own, return_lse=True)
    want, want_lse = run(batch, **options)
    for got, tensor in zip(found, (want, want_lse), strict=True):
        assert np.array_equal(fetch(got), tensor.cpu().numpy())


# --- what is not finite -----------------------------------------------------------------------


@some_cases
@pytest.mark.parametrize("side", ["k", "v"])
def test_nan_stays_with_the_rows_that_see_it(case, side):
    clean = make(case, [(300, 300), (129, 400)])
    batch = with_(clean, **{side: getattr(clean, side).clone()})
    getattr(batch, side)[200] = float("nan")  # of request 0, whose rows 200 to 299 see it
    options = {"window": 64}
    want, want_lse = run(clean, **options)
    out, lse = run(batch, **options)
    sees = slice(200, 264)
    assert out[sees].isnan().all()
    if side == "k":
        assert lse[sees].isnan().all()
        spared = [slice(0, 200), slice(264, None)]
    else:
        # Of V a row's 128 neighbours count too: a weight of 0 times NaN is NaN.
        assert_same((lse,), (want_lse,))
        spared = [slice(0, 128), slice(300, None)]
    for rows in spared:
        assert_same((out[rows], lse[rows]), (want[rows], want_lse[rows]))


@some_cases
def test_keys_in_tiles_that_no_row_sees_may_be_nan(case):
    clean = make(case, [(200, 1000)])
    k, v = clean.k.clone(), clean.v.clone()
    for x in (k, v):
        x[:128], x[384:] = float("nan"), float("nan")
    options = {"causal": False, "mask_offsets": same_for_all(clean, lambda n: (128, 384))}
    assert_same(run(with_(clean, k=k, v=v), **options), run(clean, **options))


# --- the comparison itself can fail -----------------------------------------------------------


def one_key_less(batch, b=0, key=-1):
    """Request b without one of its keys, as a kernel that misses it would see it."""
    rows, keys = batch.requests()[b]
    offsets = same_for_all(batch, lambda n: (0, n))
    offsets[rows] = int32([0, keys.stop - keys.start + key])
    return offsets


@some_cases
def test_a_key_that_is_missed_is_seen(case):
    batch = make(case, [(300, 4097)])
    out, lse = run(batch, causal=False, mask_offsets=one_key_less(batch))
    with pytest.raises(AssertionError, match="blocks are off"):
        assert_agrees(batch, out, attended(batch, causal=False)[1].float(), causal=False)
    want = attended(batch, causal=False)
    with pytest.raises(AssertionError, match="lse off by"):
        assert_lse(lse, want[1])
