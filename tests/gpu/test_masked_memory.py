# SPDX-License-Identifier: Apache-2.0
"""`masked_attention` on a GPU: rows of nobody, strides, faults; nothing else is written."""

import json

import pytest

from fastkv import ops
from helpers.masked_on_gpu import (
    CASES,
    MIXED,
    assert_agrees,
    assert_right,
    assert_same,
    assert_untouched,
    every_case,
    guarded,
    int32,
    make,
    options_of,
    run,
    same_for_all,
    some_cases,
    with_,
)
from helpers.on_gpu import with_helpers

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
