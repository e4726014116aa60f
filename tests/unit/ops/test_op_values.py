# SPDX-License-Identifier: Apache-2.0
"""Faults in values: refused on the reference with request and row, and not a byte written."""

import math

import numpy as np
import pytest

from fastkv.errors import BatchValueError, ContractError, ScaleError
from helpers.calls import WITH_CACHE, legal_call

PAGED = ("rope_write_kv", "gather_kv", "paged_attention")
WITH_ROWS = ("rope_write_kv", "paged_attention", "masked_attention")
WITH_SEGMENTS = ("rope_write_kv", "gather_kv", "masked_attention")
ATTENTION = ("paged_attention", "masked_attention")
LARGEST = 2**31 - 1


def int32(*values):
    return np.array(values, np.int32)


def fault(call, argument, got, exception=BatchValueError):
    """The error of a call with one wrong value; nothing was written."""
    error = call.raises(ContractError)
    assert type(error) is exception
    assert (error.op, error.argument, error.got) == (call.op, argument, got)
    cache = call.arguments.get("cache")
    assert error.format == (None if cache is None else cache.quant.name.value)
    assert error.expected
    return error


# The legal call has requests of 20 + 2 and 3 + 4 tokens, 16 a page: tables of 4 columns with 2
# and 1 in use, 7 query rows of which 1 is nobody's, N = 6 pages.


def test_the_legal_call_is_as_described():
    call = legal_call("paged_attention")
    assert call["cu_seqlens_q"].tolist() == [0, 2, 6]
    assert call["cache_seqlens"].tolist() == [20, 3]
    assert call["block_table"].shape == (2, 4)
    assert (call["block_table"] >= 0).sum(axis=1).tolist() == [2, 1]
    assert len(call["cache.k"]) == 6
    assert len(call["q"]) == 7


@pytest.mark.parametrize("page", [6, -2, LARGEST, -LARGEST - 1])
@pytest.mark.parametrize(("op", "b", "m"), [(op, *at) for op in PAGED for at in ((0, 1), (1, 0))])
def test_a_page_that_is_not_there(op, b, m, page):
    call = legal_call(op)
    call["block_table"][b, m] = page
    error = fault(call, f"block_table[{b}, {m}] of request {b}", str(page))
    assert error.expected == "-1 to 5"


@pytest.mark.parametrize("op", PAGED)
def test_pages_that_no_token_lies_on_may_be_anything(op):
    call = legal_call(op)
    call["block_table"][0, 2:] = LARGEST
    call["block_table"][1, 1:] = -77
    call.run()


def test_a_write_refuses_a_bad_page_of_its_prefix_that_the_next_op_would_read():
    call = legal_call("rope_write_kv")
    call["block_table"][0, 0] = 99  # tokens 0 .. 15, all cached
    fault(call, "block_table[0, 0] of request 0", "99")


@pytest.mark.parametrize("op", ["rope_write_kv", "paged_attention"])
def test_a_request_without_new_tokens_may_have_any_table(op):
    call = legal_call(op)
    call["cu_seqlens_q"] = int32(0, 0, 4)
    call["block_table"][0] = LARGEST
    call["cache_seqlens"][0] = 20  # in the middle of a page
    if op == "paged_attention":
        call["mask_offsets"][:4] = [0, 7]
    call.run()


@pytest.mark.parametrize("op", ["rope_write_kv", "paged_attention"])
def test_lengths_beyond_the_table(op):
    call = legal_call(op)
    call["cache_seqlens"][0] = 62
    call.arguments.pop("rope", None)
    for name in ("out_k", "out_v", "cu_seqlens_k"):
        call.arguments.pop(name, None)
    call["block_table"][...] = np.arange(8).reshape(2, 4) % 6
    if "mask_offsets" in call.arguments:
        call["mask_offsets"] = None
    call.run()  # 62 + 2 tokens fill 4 pages of 16
    call["cache_seqlens"][0] = 63
    error = fault(call, "cache_seqlens[0] of request 0", "63")
    assert "with 2 new tokens at most 64 (4 pages of 16" in error.expected


@pytest.mark.parametrize("length", [65, LARGEST, -1, -LARGEST - 1])
@pytest.mark.parametrize("op", PAGED)
def test_lengths_that_no_request_has(op, length):
    call = legal_call(op)
    call["cache_seqlens"][1] = length
    fault(call, "cache_seqlens[1] of request 1", str(length))


@pytest.mark.parametrize("op", WITH_ROWS)
@pytest.mark.parametrize(
    ("sums", "argument", "got"),
    [
        ((0, 7, 6), "cu_seqlens_q[2] of request 1", "6"),
        ((3, 2, 6), "cu_seqlens_q[1] of request 0", "2"),
        ((0, 2, 8), "cu_seqlens_q[2] of request 1", "8"),
        ((0, 8, 8), "cu_seqlens_q[1] of request 0", "8"),
        ((-1, 2, 6), "cu_seqlens_q[0] of request 0", "-1"),
        ((0, LARGEST, -LARGEST), "cu_seqlens_q[2] of request 1", str(-LARGEST)),
    ],
)
def test_query_rows_that_decrease_or_pass_the_end(op, sums, argument, got):
    call = legal_call(op)
    call["cu_seqlens_q"] = int32(*sums)
    fault(call, argument, got)


@pytest.mark.parametrize("op", WITH_SEGMENTS)
@pytest.mark.parametrize(
    ("sums", "argument", "got"),
    [
        ((0, 30, 29), "cu_seqlens_k[2] of request 1", "29"),
        ((0, 22, 30), "cu_seqlens_k[2] of request 1", "30"),
        ((-3, 22, 29), "cu_seqlens_k[0] of request 0", "-3"),
    ],
)
def test_segments_that_decrease_or_pass_the_end(op, sums, argument, got):
    call = legal_call(op)
    call["cu_seqlens_k"] = int32(*sums)
    fault(call, argument, got)


def test_segments_too_short_for_the_tokens_to_gather():
    call = legal_call("gather_kv")
    call["cu_seqlens_k"] = int32(0, 20, 29)
    call.run()
    call["cu_seqlens_k"] = int32(0, 19, 29)
    error = fault(call, "cu_seqlens_k[1] of request 0", "19")
    assert "0 or at least 20 rows" in error.expected


@pytest.mark.parametrize("rows", [21, 23])
def test_segments_that_are_not_cached_plus_new_tokens(rows):
    call = legal_call("rope_write_kv")
    call["cu_seqlens_k"] = int32(0, 22, 29)
    call.run()
    call["cu_seqlens_k"] = int32(0, rows, 29)
    error = fault(call, "cu_seqlens_k[1] of request 0", str(rows))
    assert "0 or 22 rows" in error.expected


@pytest.mark.parametrize("b", [0, 1])
def test_positions_beyond_the_rope_tables(b):
    call = legal_call("rope_write_kv")
    needed = (22, 7)[b]
    for table in ("cos", "sin"):
        call[f"rope.{table}"] = call[f"rope.{table}"][:needed]
    if b == 1:
        call["cache_seqlens"][0] = 0
        call["cu_seqlens_q"][...] = [0, 0, 4]
    call.run()
    for table in ("cos", "sin"):
        call[f"rope.{table}"] = call[f"rope.{table}"][: needed - 1]
    error = fault(call, f"rope of request {b}", str(needed - 1))
    assert f"at least {needed} positions" in error.expected


def test_a_request_without_new_tokens_needs_no_rope_tables():
    call = legal_call("rope_write_kv")
    call["cu_seqlens_q"] = int32(0, 0, 4)
    for table in ("cos", "sin"):
        call[f"rope.{table}"] = call[f"rope.{table}"][:7]
    call.run()


@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize(
    ("row", "b", "interval"),
    [(0, 0, (5, 4)), (1, 0, (0, 23)), (5, 1, (0, 8)), (2, 1, (-1, 3)), (3, 1, (8, 8))],
)
def test_intervals_that_end_early_or_leave_the_request(op, row, b, interval):
    call = legal_call(op)
    call["mask_offsets"][row] = interval
    start, end = interval
    error = fault(call, f"mask_offsets[{row}] of request {b}", f"[{start}, {end})")
    assert error.expected == f"0 <= start <= end <= {(22, 7)[b]} keys"


@pytest.mark.parametrize("op", WITH_CACHE)
@pytest.mark.parametrize("fmt", ["cache_int8", "cache_fp8", "cache_int4_zp"])
@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf, -math.inf])
def test_multipliers_that_no_op_can_use(op, fmt, value):
    for field in legal_call(op, fmt)["cache"].quant.static_fields:
        call = legal_call(op, fmt)
        array = call[f"cache.static.{field}"]
        last = tuple(n - 1 for n in array.shape)
        array[last] = value
        if field.endswith("_zp") and math.isfinite(value):
            call.run()
            continue
        error = fault(call, f"cache.static.{field}{list(last)}", str(np.float32(value)), ScaleError)
        assert error.expected == ("finite" if field.endswith("_zp") else "finite and > 0")
        assert bool(error.hint) == (value == 0)


@pytest.mark.parametrize("page", [6, -2, LARGEST])
@pytest.mark.parametrize("name", ["src", "dst"])
def test_pages_that_cannot_be_copied(name, page):
    call = legal_call("copy_pages", "block_wise_fp8")
    call[name][1] = page
    assert fault(call, f"{name}[1]", str(page)).expected == "-1 to 5"


def test_a_bad_page_beside_an_absent_one():
    call = legal_call("copy_pages")
    call["src"], call["dst"] = int32(-1), int32(6)
    fault(call, "dst[0]", "6")


@pytest.mark.parametrize(
    ("src", "dst", "argument", "got"),
    [
        ((0, 1), (2, 2), "dst", "page 2 twice"),
        ((2, 1), (2, 2), "dst", "page 2 twice"),
        ((0, 1), (1, 2), "src", "page 1 in both"),
        ((1, 0), (2, 1), "src", "page 1 in both"),
        ((0, 1), (1, 0), "src", "page 0 in both"),
        ((3, 3), (3, 4), "src", "page 3 in both"),
    ],
)
def test_copies_that_overlap(src, dst, argument, got):
    call = legal_call("copy_pages", "block_wise_fp8")
    call["src"], call["dst"] = int32(*src), int32(*dst)
    fault(call, argument, got)


def test_the_error_says_everything_in_one_line():
    call = legal_call("paged_attention", "cache_fp8")
    call["block_table"][1, 0] = 1234
    assert str(call.raises(BatchValueError)) == (
        "paged_attention: block_table[1, 0] of request 1 (format cache_fp8): "
        "expected -1 to 5, got 1234"
    )
