# SPDX-License-Identifier: Apache-2.0
"""Checksums cover every byte of a block."""

import numpy as np
import pytest
import xxhash

from fastkv.errors import BlockIdError
from fastkv.transfer import Regions, checksum, checksums
from helpers.transfer import block_bytes, random_caches, spec_of

SPEC = spec_of()


def test_a_checksum_is_xxh3_64_of_the_blocks_bytes():
    caches = random_caches(SPEC, 9, seed=1)
    regions = Regions(SPEC, caches)
    ids = [7, 0, 3]
    expected = [xxhash.xxh3_64_intdigest(block_bytes(caches, i)) for i in ids]
    assert checksums(regions, ids).tolist() == expected
    assert [checksum(regions.read_block(i)) for i in ids] == expected
    assert checksums(regions, []).tolist() == []


def test_many_blocks_pass_through_a_small_buffer():
    spec = spec_of("cache_int8", head_dim=128, page_size=64, num_kv_heads=2)
    caches = random_caches(spec, 50, seed=2)
    regions = Regions(spec, caches)
    assert regions.block_nbytes == 65536  # 16 at once
    ids = np.random.default_rng(3).permutation(50)
    expected = [xxhash.xxh3_64_intdigest(block_bytes(caches, i)) for i in ids]
    assert checksums(regions, ids).tolist() == expected


def test_a_block_larger_than_the_buffer():
    spec = spec_of("none", head_dim=512, page_size=256, num_kv_heads=2)
    caches = random_caches(spec, 2, seed=4)
    regions = Regions(spec, caches)
    assert regions.block_nbytes > 1 << 20
    expected = [xxhash.xxh3_64_intdigest(block_bytes(caches, i)) for i in (1, 0)]
    assert checksums(regions, [1, 0]).tolist() == expected


@pytest.mark.parametrize("at", range(len(SPEC.tensors(1))))
def test_a_flipped_bit_in_any_tensor_shows_in_its_block_alone(at):
    caches = random_caches(SPEC, 4, seed=5)
    regions = Regions(SPEC, caches)
    before = checksums(regions, range(4))
    caches[at].view(np.uint8)[2].reshape(-1)[-1] ^= 1
    assert (checksums(regions, range(4)) != before).tolist() == [False, False, True, False]


def test_ids_are_checked():
    regions = Regions(SPEC, random_caches(SPEC, 4, seed=6))
    with pytest.raises(BlockIdError, match=r"checksums: ids\[0\]: expected integers from 0 to 3"):
        checksums(regions, [4])
