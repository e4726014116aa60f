# SPDX-License-Identifier: Apache-2.0
"""Heads and contexts over 2 and 4 gloo ranks, each a process, against float64 and one rank."""

from functools import cache

import numpy as np
import pytest

from helpers.batches import FORMATS, make_batch
from helpers.compare import TOLERANCES, assert_close, assert_same_bits
from helpers.parallel_cases import CASES, exact, make, one_rank
from helpers.ranks import run_ranks


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def ranks(request, tmp_path_factory):
    return run_ranks("torch_ranks", request.param, tmp_path_factory.mktemp("ranks"))


@cache
def wanted(name):
    batch, options = make(name)
    q, *alone = one_rank(batch, options)
    return batch.format, alone, exact(batch, q, options)


@pytest.mark.parametrize("name", CASES)
def test_ranks_attend_over_the_whole_context(ranks, name):
    fmt, (alone, alone_lse), (want, want_lse) = wanted(name)
    out, lse, _ = ranks[0][name]
    assert_close(out, want, fmt)
    assert_close(lse, want_lse, fmt)
    assert out.dtype == alone.dtype
    # Both are within the bound of float64, so within twice of each other.
    room = 2 * TOLERANCES[fmt].attends * np.abs(want).max(initial=1) + 2.0**-7 * (
        out.dtype != "float32"
    )
    np.testing.assert_allclose(out.astype(float), alone.astype(float), rtol=0, atol=room)
    np.testing.assert_allclose(lse, alone_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_the_same_bits(ranks, name):
    out, lse, _ = ranks[0][name]
    for other, other_lse, _ in (found[name] for found in ranks[1:]):
        assert_same_bits(other, out)
        assert_same_bits(other_lse, lse)


@pytest.mark.parametrize("name", CASES)
def test_a_rank_writes_its_own_pages_alone(ranks, name):
    assert all(found[name][2] for found in ranks)


@cache
def whole_model(fmt):
    rng = np.random.default_rng(7)
    batch = make_batch(rng, fmt, kv_heads=2, group=4).fill(rng, "cached")
    from fastkv import ops

    q = ops.rope_write_kv(batch.qkv, batch.cache, **batch.meta)
    return ops.paged_attention(q, batch.cache, **batch.meta)


@pytest.mark.parametrize("fmt", FORMATS)
def test_heads_come_together_in_order(ranks, fmt):
    for found in ranks:
        np.testing.assert_allclose(found[f"heads {fmt}"], whole_model(fmt), rtol=0, atol=1e-5)
        assert_same_bits(found[f"heads {fmt}"], ranks[0][f"heads {fmt}"])


def test_heads_and_contexts_combine(ranks):
    name = "heads and context"
    assert (name in ranks[0]) == (len(ranks) == 4)
    for found in ranks if len(ranks) == 4 else []:
        np.testing.assert_allclose(found[name], whole_model("cache_int4_zp"), rtol=0, atol=2e-5)
