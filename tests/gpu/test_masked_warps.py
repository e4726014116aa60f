# SPDX-License-Identifier: Apache-2.0
"""`masked_attention` as GPUs without warpgroups run it, on whatever GPU there is."""

from types import SimpleNamespace

import pytest

from fastkv.contracts import calls
from fastkv.ops.cuda import masked_attention
from fastkv.ops.cuda.masked_shape import Shape
from helpers.masked_on_gpu import (
    MIXED,
    OPTIONS,
    assert_right,
    assert_same,
    assert_untouched,
    every_case,
    guarded,
    make,
    options_of,
    run,
    some_cases,
)

LENGTHS = [(n, n) for n in (1, 63, 64, 65, 127, 128, 129, 257, 511)]
LENGTHS += [(1 + 37 * i % 131, 1 + 37 * i % 131 + i) for i in range(0, 256, 5)]
LENGTHS += [(1, 2049), (700, 1000), (200, 70), (3, 0), (0, 5), (129, 515)]


@pytest.fixture(autouse=True)
def warps(monkeypatch):
    """Takes the shape of sm_80, anew at each call, and sees that it was compiled."""
    made, kernel = [], masked_attention.kernel

    def recorded(what, *args):
        made.append(dict(what.defines)["FASTKV_WARPGROUPS"])
        return kernel(what, *args)

    shape = SimpleNamespace(of=lambda dim, _: Shape.of(dim, "sm_80"))
    monkeypatch.setattr(masked_attention, "Shape", shape)
    monkeypatch.setattr(masked_attention, "kernel", recorded)
    # A checker that is remembered holds the plan of the GPU's own kernel.
    monkeypatch.setattr(calls, "masked_attention", calls.masked_attention.__wrapped__)
    yield
    assert set(made) == {"0"}


@every_case
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_lengths_agree_with_float64(case, causal):
    assert_right(make(case, LENGTHS), causal=causal)


@every_case
@pytest.mark.parametrize("option", OPTIONS)
def test_options_agree_with_float64(option, case):
    batch = make(case, MIXED)
    assert_right(batch, **options_of(batch, OPTIONS[option]))


@some_cases
def test_rows_of_nobody_and_what_lies_beside_the_output(case):
    batch = make(case, [(129, 300), (0, 4), (40, 40)], before=5, behind=9)
    buffer, out = guarded(batch.q)
    before = out[:5].clone()
    assert_right(batch, out=out)
    assert_untouched(buffer, out)
    assert_same((before,), (out[:5],))


@every_case
def test_a_request_is_the_same_in_every_batch(case):
    batch = make(case, MIXED)
    options = options_of(batch, OPTIONS["all"])
    offsets = options.pop("mask_offsets")
    whole = run(batch, mask_offsets=offsets, **options)
    assert_same(run(batch, mask_offsets=offsets, **options), whole)
    for order in ([4, 1], *([b] for b, (rows, _) in enumerate(MIXED) if rows)):
        part, own, places = batch.part(order, offsets)
        got = run(part, mask_offsets=own, **options)
        assert_same(got, tuple(x[places] for x in whole))
