# SPDX-License-Identifier: Apache-2.0
"""`paged_attention` on a GPU against float64, and against itself in other batches, bit for bit."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from fastkv import ops
from helpers import gpu
from helpers.attend import attended, places
from helpers.batches import floats, running_sum
from helpers.compare import assert_attends, assert_same_bits
from helpers.gpu import fetch, poisoned, put
from helpers.paged_on_gpu import (
    BLOCK_WISE,
    CASES,
    EACH,
    FP8,
    NONE,
    OPTIONS,
    alone,
    assert_alike,
    assert_right,
    batch_of,
    case_name,
    options_of,
    run,
)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_every_format_agrees_with_float64(case):
    assert_right(*batch_of(case))


@pytest.mark.parametrize("case", EACH, ids=case_name)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_agree_with_float64(option, case):
    batch, q = batch_of(case)
    assert_right(batch, q, **options_of(batch, OPTIONS[option]))


@pytest.mark.parametrize("largest_zp", [0.5, 8.0])
@pytest.mark.parametrize("option", ["soft_cap", "sinks", "capped_sinks_intervals"])
@pytest.mark.parametrize("case", [c for c in CASES if c[0] == "cache_int4_zp"], ids=case_name)
def test_zero_points_go_with_caps_sinks_and_empty_rows(case, option, largest_zp):
    batch, q = batch_of(case, largest_zp=largest_zp)
    assert_right(batch, q, **options_of(batch, OPTIONS[option]))


@pytest.mark.parametrize("case", CASES[3:5], ids=case_name)
def test_cupy_arrays_are_served(case):
    batch, q = batch_of(case)
    assert_right(batch, q, "cupy", **options_of(batch, OPTIONS["all"]))


@pytest.mark.parametrize("case", EACH, ids=case_name)
def test_rows_that_see_no_key_are_zero(case):
    batch, q = batch_of(case)
    nothing = np.tile(np.array([5, 5], np.int32), (len(q), 1))
    sinks = floats(np.random.default_rng(0), batch.query_heads)
    out, lse = run(batch, q, mask_offsets=nothing, sinks=sinks, out=poisoned(q.shape, case[3]))
    assert_same_bits(out, np.zeros_like(q))
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("case", [CASES[0], NONE, CASES[17]], ids=case_name)
def test_rows_of_nobody_are_cleared_behind_and_left_alone_before(case, given):
    batch, q = batch_of(case, first_row=2, padding=3)
    first, end = batch.cu_seqlens_q[[0, -1]]
    q[:first], q[end:] = np.nan, np.nan
    out = {"out": poisoned(q.shape, case[3])} if given else {}
    got, lse = assert_right(batch, q, **out)
    assert_same_bits(got[end:], np.zeros_like(q[end:]))
    assert (lse[end:] == -np.inf).all()
    if given:
        assert_same_bits(got[:first], out["out"][:first])


def test_a_batch_of_no_rows_clears_everything():
    batch, q = batch_of(CASES[0], new=(0, 0, 0, 0, 0), padding=3)
    out, lse = run(batch, q, out=poisoned(q.shape, "bfloat16"))
    assert_same_bits(out, np.zeros_like(q))
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("case", EACH, ids=case_name)
def test_keys_on_page_minus_one_are_not_seen(case):
    batch, q = batch_of(case, cached=(200, 90), new=(1, 40))
    batch.block_table[0, 1], batch.block_table[1, 0] = -1, -1
    assert_right(batch, q)
    batch.block_table[0] = -1
    _, lse = assert_right(batch, q, sinks=floats(np.random.default_rng(1), batch.query_heads))
    assert (lse[0] == -np.inf).all()


def spoil(batch, b, token, name, value, element=None):
    """One token's K, V or scale."""
    pages, slots = places(batch, b)
    tensor = getattr(batch.cache, name)
    if tensor.dtype.itemsize == 1:
        tensor, value = tensor.view(np.uint8), 0x7F  # NaN
    at = (pages[token], slice(None), slots[token])
    tensor[at if element is None else (*at, element)] = value


SPOILED = [
    *((case, side, np.nan) for case in (NONE, FP8, BLOCK_WISE) for side in "kv"),
    *((case, side, np.inf) for case in (NONE, CASES[4]) for side in "kv"),
    (CASES[4], "v", np.nan),
    (BLOCK_WISE, "k_scale", np.nan),
    (BLOCK_WISE, "v_scale", np.nan),
]


@pytest.mark.parametrize(("case", "side", "value"), SPOILED, ids=str)
def test_what_is_not_finite_stays_with_the_rows_that_see_it(case, side, value):
    batch, q = batch_of(case, cached=(50, 300, 20), new=(9, 45, 1))
    if value is np.inf and side == "v":
        q *= q.dtype.type(0.1)  # no weight rounds to 0, whose product with inf is NaN
    element = 3 if side in "kv" else None
    spoil(batch, 0, 55, side, value, element)
    spoil(batch, 1, 317, side, value, element)
    got, _ = assert_right(batch, q)
    spoiled = ~np.isfinite(got.astype(np.float32)).all(axis=2)
    sees = np.zeros(len(q), bool)
    sees[5:9] = sees[26:54] = True
    assert not spoiled[~sees].any(), "rows that may not see the key"
    # A logit of -inf, which an infinite K gives as well, takes nothing away from the others.
    assert spoiled[sees].any() if value is np.inf and side == "k" else spoiled[sees].all()


# 10 chunks; 79 in 5 groups; 34 in 3; lengths at and around multiples of a chunk, and short ones.
LONG = (5_000, 39_990, 3, 700, 17_000, 2_047, 2_048, 600)


@cache
def long_batch(index):
    """A decode batch that is split over blocks, and its q; not to be changed."""
    return batch_of(CASES[index], kv_heads=1, cached=LONG, new=(1,) * len(LONG))


@pytest.mark.parametrize("index", [0, 11, 14])
@pytest.mark.parametrize("option", ["scale", "window", "all"])
def test_long_requests_are_split_over_blocks(index, option):
    batch, q = long_batch(index)
    asked = OPTIONS[option] | ({"window": 30_000} if option == "all" else {})
    assert_right(batch, q, **options_of(batch, asked))


@pytest.mark.parametrize("index", [0, 11, 14])
def test_decode_is_the_same_in_every_batch(index):
    batch, q = long_batch(index)
    whole = run(batch, q)
    assert_alike(run(batch, q), whole, slice(None))
    for order in ([5, 1, 7, 0, 2, 6, 4, 3], *([b] for b in range(len(LONG)))):
        part, part_q, _, rows = alone(batch, q, order)
        assert_alike(whole, run(part, part_q), rows)


@pytest.mark.parametrize("case", [CASES[2], CASES[12], CASES[15]], ids=case_name)
@pytest.mark.parametrize("option", ["scale", "all"])
def test_decode_is_the_same_beside_a_prefill(case, option):
    # The prefill makes the average request long enough for a kernel with more rows a block.
    batch, q = batch_of(case, kv_heads=1, cached=(5_000, 100, 20_000), new=(1, 300, 1))
    made = options_of(batch, OPTIONS[option] | {"window": 6_000})
    whole = run(batch, q, **made)
    for order in ([0], [1], [2], [2, 0], [1, 2]):
        part, part_q, part_options, rows = alone(batch, q, order, **made)
        assert_alike(whole, run(part, part_q, **part_options), rows)


def test_a_block_with_several_whole_items_agrees_with_float64():
    # 1056 rows of 16 heads, 32 rows and 20 chunks an item: two items a block of 132 * 2.
    case = CASES[4]
    batch, q = batch_of(case, kv_heads=1, group=16, cached=(8_944,), new=(1_056,))
    whole = run(batch, q)
    assert_attends(*whole, attended(batch, q, [0, 1, 500, 777, 1_055]))
    last = batch.with_(
        cached=(9_960,),
        new=(40,),
        cu_seqlens_q=running_sum([40]),
        cache_seqlens=np.array([9_960], np.int32),
    )
    assert_alike(whole, run(last, q[-40:]), slice(1_016, 1_056))


def test_many_requests_agree_with_float64():
    # More requests than a block has threads, many of them empty.
    rng = np.random.default_rng(5)
    lengths, new = rng.integers(0, 60, 700), rng.integers(0, 2, 700)
    batch, q = batch_of(CASES[0], cached=tuple(lengths), new=tuple(new))
    assert_right(batch, q)


@pytest.mark.parametrize("layout", gpu.LAYOUTS)
@pytest.mark.parametrize("case", [CASES[2], CASES[5], BLOCK_WISE], ids=case_name)
def test_strided_caches_are_served(case, layout):
    batch, q = batch_of(case)
    cache = gpu.LAYOUTS[layout](batch.cache, "torch")
    assert_alike(run(batch, q, cache=cache), run(batch, q), slice(None))
    assert_right(batch, q, cache=cache)


@pytest.mark.parametrize("case", [NONE, CASES[13]], ids=case_name)
def test_q_and_out_may_be_slices(case):
    batch, q = batch_of(case)
    wide = put(np.concatenate([poisoned(q.shape, case[3]), q], axis=1), "torch")
    target = put(poisoned(wide.shape, case[3]), "torch")
    heads = batch.query_heads
    out, lse = ops.paged_attention(
        wide[:, heads:],
        put(batch.cache, "torch"),
        **put(batch.meta, "torch"),
        out=target[:, :heads],
        return_lse=True,
    )
    assert_attends(fetch(out.contiguous()).view(q.dtype), fetch(lse), attended(batch, q))
    left = fetch(target[:, heads:].contiguous()).view(q.dtype)
    assert_same_bits(left, poisoned(q.shape, case[3]))


def at_the_far_end(tensor, shape, ids):
    """Pages in a cache of 4.4 GiB, at `ids`; 0x7f, NaN in e4m3, in all others."""
    import torch

    large = torch.empty(shape, dtype=torch.uint8, device=gpu.DEVICE)
    large.fill_(0x7F)
    large[torch.from_numpy(ids).to(gpu.DEVICE)] = put(tensor.view(np.uint8), "torch")
    return large.view(put(tensor[:1], "torch").dtype)


@pytest.mark.parametrize("case", [CASES[5], CASES[8]], ids=case_name)
def test_caches_past_four_gibibytes_are_served(case):
    batch, q = batch_of(case)
    pages, *page_shape = batch.cache.k.shape
    most = int(4.4 * 2**30) // int(np.prod(page_shape))
    page_bytes = int(np.prod(page_shape))
    # From the last page before 2^31 bytes on; the last ones are past 2^32.
    ids = np.linspace(2**31 // page_bytes - 1, most - 1, pages).astype(np.int64)
    table = batch.block_table.copy()
    table[table >= 0] = ids[table[table >= 0]]
    shape = (most, *page_shape)
    cache = replace(
        put(batch.cache, "torch"),
        k=at_the_far_end(batch.cache.k, shape, ids),
        v=at_the_far_end(batch.cache.v, shape, ids),
    )
    far = run(batch.with_(block_table=table), q, cache=cache)
    assert_alike(far, run(batch, q), slice(None))
    assert_attends(*far, attended(batch, q))
