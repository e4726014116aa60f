# SPDX-License-Identifier: Apache-2.0
"""`copy_pages`: K, V and scales of whole pages, bit for bit, and nothing else."""

import numpy as np
import pytest

from fastkv import ops
from helpers.batches import VARIANTS, clone, make_batch, snapshot, tensors_of
from helpers.compare import assert_same_bits


def ids(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_tensor_of_a_page_moves_and_no_other_byte(variant):
    rng = np.random.default_rng(3)
    cache = make_batch(rng, *variant, cached=(40, 30), new=(1, 1)).fill(rng).cache
    want = clone(cache)
    for name, tensor in tensors_of(want).items():
        tensor[[1, 4, 6]] = getattr(cache, name)[[5, 5, 0]]
    # Page 5 twice; 2 onto itself; pairs with -1 on either side.
    ops.copy_pages(cache, ids(5, 2, -1, 5, 7, 0), ids(1, 2, 3, 4, -1, 6))
    for name, tensor in tensors_of(want).items():
        assert_same_bits(getattr(cache, name), tensor)


def test_a_dynamic_format_moves_its_scales():
    rng = np.random.default_rng(5)
    batch = make_batch(rng, "block_wise_fp8", cached=(16,), new=(0,), padding=0).fill(rng)
    page = int(batch.block_table[0, 0])
    free = (page + 1) % len(batch.cache.k)
    ops.copy_pages(batch.cache, ids(page), ids(free))
    moved = batch.with_(block_table=ids(free)[None])
    for side in "kv":
        np.testing.assert_array_equal(moved.held(side, 0), batch.held(side, 0))


@pytest.mark.parametrize("pairs", [[], [(-1, 2)], [(3, -1)], [(1, 1)], [(-1, -1), (-1, -1)]])
def test_nothing_to_move(pairs):
    cache = make_batch(np.random.default_rng(7), "block_wise_fp8").cache
    before = snapshot(cache)
    src, dst = ids(*[s for s, _ in pairs]), ids(*[d for _, d in pairs])
    ops.copy_pages(cache, src, dst)
    for name, tensor in before.items():
        assert_same_bits(getattr(cache, name), tensor)


def test_an_absent_pair_overlaps_with_nothing():
    cache = make_batch(np.random.default_rng(11)).cache
    want = clone(cache)
    want.k[2], want.v[2] = cache.k[1], cache.v[1]
    # 2 is read by a pair that goes nowhere, 1 is written by one that comes from nowhere.
    ops.copy_pages(cache, ids(1, 2, -1), ids(2, -1, 1))
    assert_same_bits(cache.k, want.k)
    assert_same_bits(cache.v, want.v)
