# SPDX-License-Identifier: Apache-2.0
"""`paged_attention` on a GPU against float64, and against itself in other batches, bit for bit.

A specialization takes seconds to compile, so the cases share a few: `CASES` lists them, with the
query rows a request that choose the kernel's columns.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from fastkv import ops
from helpers import gpu
from helpers.attend import attended, filled, places
from helpers.batches import case_id, floats, running_sum
from helpers.compare import assert_attends, assert_same_bits
from helpers.gpu import fetch, poisoned, put

_NAMES = ("fmt", "granularity", "head_dim", "dtype", "page_size", "kv_heads", "group")
DECODE = {"cached": (37, 0, 130, 1, 700), "new": (1, 1, 1, 0, 1)}
DRAFT = {"cached": (60, 5, 0, 16, 333), "new": (4, 8, 9, 0, 17)}
SHORT = {"cached": (60, 5, 0, 16), "new": (4, 4, 4, 4)}
PREFILL = {"cached": (0, 200, 64, 3), "new": (130, 0, 33, 17)}
MIXED = {"cached": (90, 0, 31, 200, 7), "new": (1, 130, 0, 4, 1)}
# Format, static granularity, head dim, dtype of q (of a `none` cache too), page size, KV heads, G,
# requests: 14 specializations, since rows of one request (T / B * G) give 8, 16 or 32 a block.
CASES = [
    ("none", None, 128, "bfloat16", 16, 2, 4, DECODE),  # 8
    ("none", None, 128, "bfloat16", 64, 2, 8, DRAFT),  # 32
    ("none", None, 128, "bfloat16", 32, 3, 4, MIXED),
    ("none", None, 64, "float16", 128, 2, 7, DECODE),  # 8
    ("none", None, 64, "float16", 32, 3, 1, PREFILL),  # 32
    ("cache_int8", "head", 128, "bfloat16", 128, 2, 16, DECODE),  # 16
    ("cache_int8", "channel", 96, "float16", 16, 2, 4, DRAFT),  # 32
    ("cache_int8", "flat", 96, "float16", 64, 1, 7, PREFILL),
    ("cache_fp8", "head", 256, "bfloat16", 32, 2, 8, DECODE),  # 8
    ("cache_fp8", "head", 256, "bfloat16", 64, 1, 4, SHORT),  # 16
    ("cache_fp8", "head", 256, "bfloat16", 16, 1, 7, MIXED),
    ("cache_int4_zp", "channel", 128, "bfloat16", 16, 2, 4, DECODE),  # 8
    ("cache_int4_zp", "flat", 128, "bfloat16", 64, 2, 4, MIXED),  # 32
    ("cache_int4_zp", "channel", 64, "float32", 128, 2, 4, SHORT),  # 16
    ("block_wise_fp8", None, 128, "bfloat16", 128, 3, 4, DECODE),  # 8
    ("block_wise_fp8", None, 128, "bfloat16", 16, 2, 4, MIXED),  # 32
    ("block_wise_fp8", None, 128, "bfloat16", 32, 1, 16, DRAFT),
    ("cache_int8", "flat", 96, "float32", 32, 2, 1, PREFILL),  # 32
]
NONE, INT8, FP8, INT4, BLOCK_WISE = CASES[1], CASES[5], CASES[10], CASES[12], CASES[15]
EACH = (NONE, CASES[6], FP8, INT4, BLOCK_WISE)
OPTIONS = {
    "not_causal": {"causal": False},
    "window": {"window": 29},
    "window_of_one": {"window": 1},
    "soft_cap": {"soft_cap": 0.7},
    "sinks": {"sinks": True},
    "intervals": {"mask_offsets": True},
    "scale": {"scale": 0.3},
    "not_causal_window": {"causal": False, "window": 40},
    "capped_sinks_intervals": {"soft_cap": 0.7, "sinks": True, "mask_offsets": True},
    "all": {"window": 50, "soft_cap": 2.0, "sinks": True, "mask_offsets": True, "scale": 0.2},
}


def case_name(case):
    return case_id(dict(enumerate(case[:-1])))


def batch_of(case, seed=11, dtype=None, **changes):
    """The case's batch and q; `changes` are arguments of `make_batch`."""
    named = dict(zip(_NAMES, case, strict=False)) | case[-1] | changes
    if named["fmt"] != "none":
        named["dtype"] = "bfloat16"
    batch = filled(seed, named.pop("fmt"), named.pop("granularity"), **named)
    spec = batch.cache.spec
    rng = np.random.default_rng(seed + 1)
    shape = (len(batch.qkv), batch.query_heads, spec.head_dim)
    return batch, floats(rng, shape, dtype or case[3])


def options_of(batch, asked, seed=5):
    """Options with sinks and intervals made for the batch; a fifth of the rows sees nothing."""
    rng = np.random.default_rng(seed)
    made = dict(asked)
    if asked.get("sinks") is True:
        made["sinks"] = floats(rng, batch.query_heads, scale=2.0)
    if asked.get("mask_offsets") is True:
        offsets = np.full((len(batch.qkv), 2), (9, 2), np.int32)
        for b, length in enumerate(batch.lengths):
            ends = np.sort(rng.integers(0, length + 1, (batch.new[b], 2)), axis=1)
            ends[rng.random(len(ends)) < 0.2] = length
            offsets[batch.rows(b)] = ends
        made["mask_offsets"] = offsets
    return made


def run(batch, q, library="torch", cache=None, **options):
    """Out and LSE of the op on a GPU, as NumPy arrays."""
    cache = put(batch.cache, library) if cache is None else cache
    options = put(options, library)
    out, lse = ops.paged_attention(
        put(q, library), cache, **put(batch.meta, library), return_lse=True, **options
    )
    assert options.get("out") is None or out is options["out"]
    return fetch(out).view(q.dtype), fetch(lse)


def assert_right(batch, q, library="torch", cache=None, rows=None, **options):
    """The op agrees with float64; returns its results."""
    got = run(batch, q, library, cache, **options)
    options.pop("out", None)
    assert_attends(*got, attended(batch, q, rows, **options))
    return got


def alone(batch, q, order, **options):
    """The batch of some of its requests, with their q and options."""
    rows = np.concatenate([np.arange(len(q))[batch.rows(b)] for b in order])
    new = tuple(batch.new[b] for b in order)
    part = batch.with_(
        cached=tuple(batch.cached[b] for b in order),
        new=new,
        cu_seqlens_q=running_sum(new),
        cache_seqlens=batch.cache_seqlens[order],
        block_table=batch.block_table[order],
        qkv=batch.qkv[rows],
    )
    if options.get("mask_offsets") is not None:
        options["mask_offsets"] = options["mask_offsets"][rows]
    return part, q[rows], options, rows


def assert_alike(whole, part, rows):
    """Rows of two results, bit for bit."""
    for one, other in zip(whole, part, strict=True):
        assert_same_bits(one[rows], other)


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
