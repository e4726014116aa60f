# SPDX-License-Identifier: Apache-2.0
"""`Regions`: a block id means all of its bytes, and nothing else's."""

import ml_dtypes
import numpy as np
import pytest

from fastkv.errors import (
    BlockIdError,
    BlockSizeError,
    DtypeError,
    ReadOnlyError,
    ShapeError,
    SpecMismatchError,
    UnsupportedError,
)
from fastkv.transfer.regions import Regions
from helpers.transfer import QUANT, block_bytes, random_caches, spec_of

SPEC = spec_of()
NAMES = [
    "layers.0.k",
    "layers.0.v",
    "layers.0.k_scale",
    "layers.0.v_scale",
    "layers.1.k",
    "layers.1.v",
    "layers.2.k",
    "layers.2.v",
    "layers.3.k",
    "layers.3.v",
]
# Hkv · P · D elements, and Hkv · P scales of 4 bytes
NBYTES = [192, 192, 48, 48, 192, 192, 384, 384, 96, 96]


def test_every_tensor_is_a_region_and_scales_are_among_them():
    caches = random_caches(SPEC, 5, seed=1)
    regions = Regions(SPEC, caches)
    assert [region.name for region in regions.regions] == NAMES
    assert [region.nbytes for region in regions.regions] == NBYTES
    assert [region.stride for region in regions.regions] == NBYTES
    assert [region.address for region in regions.regions] == [a.ctypes.data for a in caches]
    assert (regions.num_blocks, regions.block_nbytes) == (5, sum(NBYTES))


@pytest.mark.parametrize("quant", [*QUANT, QUANT])
def test_a_block_moves_with_its_scales_and_touches_no_other(quant):
    spec = spec_of(quant, dtype="bfloat16", scale_dtype="bfloat16")
    caches, others = random_caches(spec, 7, seed=2), random_caches(spec, 6, seed=3)
    source, target = Regions(spec, caches), Regions(spec, others)
    before = [block_bytes(others, i) for i in range(6)]
    taken = source.read_block(6)
    assert bytes(taken) == block_bytes(caches, 6)
    target.write_block(2, taken)
    after = [block_bytes(others, i) for i in range(6)]
    assert after == [*before[:2], block_bytes(caches, 6), *before[3:]]


def test_a_read_block_is_a_copy():
    caches = random_caches(SPEC, 3, seed=4)
    regions = Regions(SPEC, caches)
    taken, expected = regions.read_block(1), block_bytes(caches, 1)
    regions.write_block(1, regions.read_block(0))
    assert bytes(taken) == expected


def test_many_blocks_are_rows_in_the_order_asked_for():
    caches = random_caches(SPEC, 6, seed=5)
    regions = Regions(SPEC, caches)
    rows = regions.read_blocks(np.array([4, 0, 5]))
    assert [row.tobytes() for row in rows] == [block_bytes(caches, i) for i in (4, 0, 5)]
    out = np.zeros((4, regions.block_nbytes), np.uint8)
    assert np.shares_memory(regions.read_blocks([3, 2], out), out)
    assert [row.tobytes() for row in out[:2]] == [block_bytes(caches, i) for i in (3, 2)]
    assert not out[2:].any()
    assert regions.read_blocks([]).shape == (0, regions.block_nbytes)


def test_the_caches_are_not_copied():
    caches = random_caches(SPEC, 3, seed=6)
    regions = Regions(SPEC, caches)
    caches[3][2] = -caches[3][2]
    assert bytes(regions.read_block(2)) == block_bytes(caches, 2)


def interleaved(spec, num_blocks, seed):
    """K and V of a layer in one tensor `[N, 2, Hkv, P, D]`, as some engines keep them."""
    caches = []
    for layer in range(spec.num_layers):
        k, v, *scales = spec.layer_tensors(layer, num_blocks)
        rng = np.random.default_rng((seed, layer))
        both = rng.standard_normal((num_blocks, 2, *k.shape[1:])).astype(k.dtype)
        caches += [both[:, 0], both[:, 1]]
        assert not scales
        assert v.shape == k.shape
    return caches


def test_pages_may_lie_apart():
    spec = spec_of("none")
    caches = interleaved(spec, 4, seed=7)
    regions = Regions(spec, caches)
    assert [(r.nbytes, r.stride) for r in regions.regions] == [(384, 768)] * 4
    assert bytes(regions.read_block(3)) == block_bytes(caches, 3)
    others = interleaved(spec, 4, seed=8)
    before = [block_bytes(others, i) for i in range(4)]
    Regions(spec, others).write_block(1, regions.read_block(3))
    assert [block_bytes(others, i) for i in (0, 2, 3)] == [before[i] for i in (0, 2, 3)]
    assert block_bytes(others, 1) == block_bytes(caches, 3)


def test_extents_cover_each_region_once():
    spec = spec_of("none")
    caches = interleaved(spec, 4, seed=9)
    extents = Regions(spec, caches).extents()
    bases = sorted(cache.ctypes.data for cache in caches[::2])
    assert extents == [(base, 4 * 768) for base in bases]
    apart = Regions(SPEC, random_caches(SPEC, 5, seed=1))
    expected = sorted((r.address, 5 * r.nbytes) for r in apart.regions)
    assert apart.extents() == expected


def test_one_page_may_have_any_stride():
    spec = spec_of("none")
    caches = [array[:1] for array in random_caches(spec, 2, seed=10)]
    assert Regions(spec, caches).num_blocks == 1


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([0, 5], r"ids\[1\]: expected integers from 0 to 4, got 5"),
        ([-1], r"ids\[0\]: expected integers from 0 to 4, got -1"),
        ([3, 1, 3], "ids: expected each block once, got block 3 twice"),
        ([1.0], "ids: expected integers from 0 to 4, got 1.0"),
        ([True], "ids: expected integers from 0 to 4, got True"),
        ([2**70], "ids: expected integers from 0 to 4"),
        (np.array([0.0]), "ids: expected integers from 0 to 4, got 0.0"),
    ],
)
def test_ids_are_refused(ids, says):
    regions = Regions(SPEC, random_caches(SPEC, 5, seed=11))
    with pytest.raises(BlockIdError, match=f"^Regions.read_blocks: {says}"):
        regions.read_blocks(ids)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_block_of_another_size_is_refused_and_nothing_written(change):
    caches = random_caches(SPEC, 3, seed=12)
    regions = Regions(SPEC, caches)
    before = [block_bytes(caches, i) for i in range(3)]
    data = bytes(regions.block_nbytes + change)
    with pytest.raises(BlockSizeError, match=f"expected {sum(NBYTES)} bytes, got {len(data)}"):
        regions.write_block(1, data)
    assert [block_bytes(caches, i) for i in range(3)] == before


def test_bytes_are_taken_for_a_storage_dtype():
    caches = random_caches(SPEC, 3, seed=13)
    raw = [a.view(np.uint8) if a.itemsize == 1 else a for a in caches]
    assert bytes(Regions(SPEC, raw).read_block(2)) == block_bytes(caches, 2)


def changed(i, change):
    caches = random_caches(SPEC, 4, seed=14)
    caches[i] = change(caches[i])
    return caches


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("caches", "error", "says"),
    [
        (random_caches(SPEC, 2, seed=1)[:-1], SpecMismatchError, "expected 10 tensors, got 9"),
        (changed(5, lambda a: a[:3]), ShapeError, r"caches\[5\] \(format cache_int8\): expected v"),
        (changed(3, lambda a: a[:, :2]), ShapeError, r"v_scale \[4, 3, 4\], got \[4, 2, 4\]"),
        (changed(0, lambda a: a[:0]), ShapeError, r"caches\[0\]: expected at least one page"),
        (
            changed(4, lambda a: a.view(np.int16).repeat(2, -1)),
            DtypeError,
            "expected int8, got int16",
        ),
        (
            changed(2, lambda a: a.view(np.float16)[..., ::2]),
            DtypeError,
            "expected float32, got float16",
        ),
        (changed(7, read_only), ReadOnlyError, r"caches\[7\] .*: expected writeable memory"),
        (
            changed(6, np.asfortranarray),
            UnsupportedError,
            r"caches\[6\] \(format none\): expected k whose pages are contiguous bytes",
        ),
        (changed(8, lambda a: a[::-1]), UnsupportedError, "whose pages are contiguous"),
        (
            changed(1, lambda a: np.broadcast_to(a[:1], a.shape)),
            ReadOnlyError,
            r"caches\[1\] .*: expected writeable memory",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(caches, error, says):
    with pytest.raises(error, match=says):
        Regions(SPEC, caches)


def test_tensors_that_share_memory_are_refused():
    caches = random_caches(SPEC, 4, seed=15)
    caches[5] = caches[4]
    with pytest.raises(SpecMismatchError, match=r"layers\.1\.k and layers\.1\.v overlap"):
        Regions(SPEC, caches)


def test_scales_of_another_dtype_than_the_spec_are_refused():
    spec = spec_of(scale_dtype="bfloat16")
    caches = random_caches(SPEC, 4, seed=16)
    assert spec.tensors(1)[2].dtype == np.dtype(ml_dtypes.bfloat16).name
    with pytest.raises(DtypeError, match=r"caches\[2\] .* expected bfloat16, got float32"):
        Regions(spec, caches)
