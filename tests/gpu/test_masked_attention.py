# SPDX-License-Identifier: Apache-2.0
"""`masked_attention` on a GPU against float64, and against itself in other batches, bit for bit."""

import json

import numpy as np
import pytest

from fastkv import ops
from helpers import masked_on_gpu
from helpers.gpu import fetch, put
from helpers.masked_on_gpu import (
    CASES,
    Batch,
    assert_agrees,
    assert_lse,
    assert_right,
    assert_same,
    attended,
    case_name,
    int32,
    intervals,
    make,
    normal,
    options_of,
    run,
    with_,
)
from helpers.on_gpu import with_helpers

every_case = pytest.mark.parametrize("case", CASES, ids=case_name)
# One of each head dim and one more, of both dtypes.
some_cases = pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 5, 6, 1)], ids=case_name)
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
MIXED = [(1, 1), (129, 300), (64, 64), (0, 7), (700, 1000), (33, 20), (1, 515), (128, 128)]
OPTIONS = {
    "window of one": {"window": 1},
    "window": {"window": 29},
    "window of a tile": {"window": 128},
    "wide window": {"window": 300},
    "huge window": {"window": 2**40},
    "soft_cap": {"soft_cap": 0.7},
    "sinks": {"sinks": True},
    "intervals": {"mask_offsets": True},
    "scale": {"scale": 0.2},
    "negative scale": {"scale": -0.1},
    "full and a window": {"causal": False, "window": 40},
    "full and intervals": {"causal": False, "mask_offsets": True},
    "capped, sinks, intervals": {"soft_cap": 2.0, "sinks": True, "mask_offsets": True},
    "all": {"window": 200, "soft_cap": 3.0, "sinks": True, "mask_offsets": True, "scale": 0.15},
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


def same_for_all(batch, of):
    """Intervals of every row, `of(keys of its request)`."""
    offsets = np.zeros((len(batch.q), 2), np.int32)
    for rows, keys in batch.requests():
        offsets[rows] = of(keys.stop - keys.start)
    return int32(offsets.tolist())


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


# --- rows of nobody, and memory of others -----------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
@some_cases
def test_rows_of_nobody_are_cleared_behind_and_left_alone_before(case, given):
    batch = make(case, [(129, 300), (0, 4), (40, 40)], before=5, behind=9)
    options = options_of(batch, {"mask_offsets": True})
    if given:
        out, lse = assert_right(batch, **options)
        assert out[:5].isnan().all()
    else:
        out, lse = ops.masked_attention(
            batch.q, batch.k, batch.v, **batch.sums(), **options, return_lse=True
        )
        assert_agrees(batch, out, lse, **options)
        assert not out[:5].any()
    assert not out[-9:].any()
    nobody = float("-inf")
    assert (lse[:5] == nobody).all()
    assert (lse[-9:] == nobody).all()


def test_a_batch_of_no_rows_clears_everything():
    batch = make(CASES[0], [(0, 0), (0, 3)], behind=140)
    out, lse = run(batch)
    assert not out.any()
    assert (lse == float("-inf")).all()
    out, lse = run(with_(batch, cu_seqlens_q=(0,), cu_seqlens_k=(0,)))  # nor any request
    assert not out.any()
    assert (lse == float("-inf")).all()


def guarded(like, extra=3):
    """A buffer of 0x5a bytes, and a view of `like`'s shape within: rows around, a head beside."""
    import torch

    tokens, heads, dim = like.shape
    buffer = torch.empty((tokens + 2 * extra, heads + 1, dim), dtype=like.dtype, device=like.device)
    buffer.view(torch.uint8).fill_(0x5A)
    return buffer, buffer[extra:-extra, :heads]


def assert_untouched(buffer, view, extra=3):
    import torch

    left = buffer.clone().view(torch.int16)
    left[extra:-extra, : view.shape[1]] = 0x5A5A
    assert (left == 0x5A5A).all(), "something was written beside the output"


@every_case
def test_nothing_is_written_beside_the_output(case):
    batch = make(case, MIXED, behind=3)
    buffer, out = guarded(batch.q)
    assert_right(batch, out=out)
    assert_untouched(buffer, out)


@every_case
def test_views_of_packed_qkv_are_served(case):
    import torch

    batch = make(case, [(n, n) for n in (130, 1, 64, 300)])
    packed = torch.cat([batch.q, batch.k, batch.v], dim=1)
    heads, kv_heads = case.kv_heads * case.group, case.kv_heads
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=1)
    assert not q.is_contiguous()
    strided = run(with_(batch, q=q, k=k, v=v))
    assert_same(strided, run(batch))
    assert_agrees(batch, *strided)


def test_head_major_keys_are_served():
    batch = make(CASES[0], MIXED)
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (batch.k, batch.v))
    assert not k.is_contiguous()
    assert_same(run(with_(batch, k=k, v=v)), run(batch))


def test_keys_past_four_gibibytes_are_served():
    import torch

    case = CASES[0]._replace(kv_heads=1)
    batch = make(case, [(200, 300), (5, 40)])
    tokens = int(4.4 * 2**30) // (2 * case.head_dim * 2)
    both = torch.empty((tokens, 2, case.head_dim), dtype=batch.k.dtype, device=batch.k.device)
    both.view(torch.uint8).fill_(0xFF)  # NaN
    first = tokens - len(batch.k)
    both[first:, :1], both[first:, 1:] = batch.k, batch.v
    sums = tuple(first + at for at in batch.cu_seqlens_k)
    far = with_(batch, k=both[:, :1], v=both[:, 1:], cu_seqlens_k=sums)
    assert_same(run(far), run(batch))


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
    batch = make(case, BATCHES["edges"])
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


# --- values at fault --------------------------------------------------------------------------

BIG = 2**31 - 1
# Of four requests of 40 rows and 60 keys each. Argument, its values, the error's argument.
SUMS = {
    "rows decrease": ("cu_seqlens_q", (0, 40, 20, 120, 160), "cu_seqlens_q at request 1"),
    "rows past the end": ("cu_seqlens_q", (0, 40, 80, 120, 161), "cu_seqlens_q at request 3"),
    "rows far past it": ("cu_seqlens_q", (0, 40, 80, 120, BIG), "cu_seqlens_q at request 3"),
    "negative rows": ("cu_seqlens_q", (-3, 40, 80, 120, 160), "cu_seqlens_q at request 0"),
    "keys decrease": ("cu_seqlens_k", (0, 60, 120, 70, 240), "cu_seqlens_k of request 2"),
    "keys past the end": ("cu_seqlens_k", (0, 60, 120, 180, 241), "cu_seqlens_k of request 3"),
    "keys far past it": ("cu_seqlens_k", (0, 60, 120, 180, BIG), "cu_seqlens_k of request 3"),
    "negative keys": ("cu_seqlens_k", (-9, 60, 120, 180, 240), "cu_seqlens_k of request 0"),
}
# An interval of row 50, which is request 1's; what it is clamped to.
INTERVALS = {
    "start behind end": ((9, 4), (9, 9)),
    "start before the keys": ((-4, 7), (0, 7)),
    "end past the keys": ((3, 61), (3, 60)),
    "both": ((-(2**31), BIG), (0, 60)),
    "behind the keys": ((60, 100), (60, 60)),
}


def faulty_batch():
    return make(CASES[0], [(40, 60)] * 4)


@pytest.mark.parametrize("fault", SUMS)
def test_sums_at_fault_write_nothing_elsewhere(fault):
    import torch

    name, values, _ = SUMS[fault]
    batch = faulty_batch()
    buffer, out = guarded(batch.q)
    lse = run(with_(batch, **{name: values}), out=out)[1]
    torch.cuda.synchronize()
    assert_untouched(buffer, out)
    assert lse.shape == batch.q.shape[:2]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fault", INTERVALS)
def test_intervals_at_fault_are_clamped(fault, causal):
    given, clamped = INTERVALS[fault]
    batch = faulty_batch()
    offsets = same_for_all(batch, lambda n: (1, n))
    offsets[50] = int32(given)
    buffer, out = guarded(batch.q)
    got = run(batch, causal=causal, mask_offsets=offsets, out=out)
    assert_untouched(buffer, out)
    offsets[50] = int32(clamped)
    assert_same(got, run(batch, causal=causal, mask_offsets=offsets))


REPORT = """
import json
from fastkv.errors import BatchValueError
from helpers.masked_on_gpu import CASES, int32, make, run, with_

given = json.loads({given!r})
batch = make(CASES[0], [(40, 60)] * 4)
offsets = int32([[1, 60]] * 160)

def reported(batch, **options):
    try:
        run(batch, **options)
    except BatchValueError as error:
        return [error.op, error.argument]
    return None

found = {{"clean": [reported(batch), reported(batch, mask_offsets=offsets)]}}
for name, (argument, values, _) in given["sums"].items():
    found[name] = reported(with_(batch, **{{argument: tuple(values)}}))
for name, (interval, _) in given["intervals"].items():
    wrong = offsets.clone()
    wrong[50] = int32(interval)
    found[name] = reported(batch, mask_offsets=wrong)
print(json.dumps(found))
"""


def test_faults_are_reported_when_asked_for(run_python):
    given = json.dumps({"sums": SUMS, "intervals": INTERVALS})
    code = REPORT.format(given=given)
    found = json.loads(run_python(code, FASTKV_CHECK="1", **with_helpers()).stdout)
    assert found.pop("clean") == [None, None], "a legal call is not reported"
    want = {name: ["masked_attention", argument] for name, (_, _, argument) in SUMS.items()}
    want |= {name: ["masked_attention", "mask_offsets of request 1"] for name in INTERVALS}
    assert found == want


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


def test_bits_and_guards_are_compared():
    batch = make(CASES[0], [(3, 3)])
    buffer, out = guarded(batch.q)
    run(batch, out=out)
    assert_untouched(buffer, out)
    buffer[0, 0, 0] = 1
    with pytest.raises(AssertionError, match="beside the output"):
        assert_untouched(buffer, out)
    changed = out.clone()
    changed[1, 2, 3] += 1
    with pytest.raises(AssertionError, match="1 of"):
        assert_same((changed,), (out.contiguous(),))
    assert isinstance(batch, Batch)
    assert masked_on_gpu.DEVICE == "cuda:0"
