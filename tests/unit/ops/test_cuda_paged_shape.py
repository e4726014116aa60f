# SPDX-License-Identifier: Apache-2.0
"""How paged attention uses a multiprocessor: what fits, and what may not depend on the batch."""

import pytest

from fastkv.ops.cuda import paged_shape
from fastkv.ops.cuda.paged_shape import Shape, row_bytes
from fastkv.quant import quant_spec
from helpers.batches import FORMATS

# Shared memory of a multiprocessor: sm_80, sm_89 and sm_120, sm_90.
MEMORIES = (164 * 1024, 100 * 1024, 228 * 1024)
DIMS = (64, 96, 128, 256)
ROWS = (1, 4, 8, 9, 16, 17, 128)

every_cache = pytest.mark.parametrize("dim", DIMS)
every_format = pytest.mark.parametrize("fmt", FORMATS)
every_memory = pytest.mark.parametrize("memory", MEMORIES)


def shapes(fmt, dim, memory):
    """By query rows a request; without those that do not fit."""
    found = {rows: Shape.of(quant_spec(fmt), dim, rows, memory) for rows in ROWS}
    return {rows: shape for rows, shape in found.items() if shape is not None}


@every_memory
@every_cache
@every_format
def test_the_rows_of_a_batch_choose_nothing_that_rounds(fmt, dim, memory):
    # Warps share a chunk, so another number of them would add in another order.
    assert len({shape.warps for shape in shapes(fmt, dim, memory).values()}) <= 1


@every_memory
@every_cache
@every_format
def test_blocks_fit_in_the_memory_with_what_the_driver_takes(fmt, dim, memory):
    for shape in shapes(fmt, dim, memory).values():
        assert shape.blocks * (shape.shared + 1024) <= memory
        assert 2 <= shape.stages <= paged_shape.STAGES
        # 64K registers: the compiler gets at least 128 a thread.
        assert shape.blocks * shape.warps * 32 * 128 <= 64 * 1024


@every_memory
@every_cache
@every_format
def test_only_head_dim_256_of_many_bytes_does_not_fit_everywhere(fmt, dim, memory):
    fits = shapes(fmt, dim, memory)
    if dim == 256 and memory == MEMORIES[1] and fmt != "cache_int4_zp":
        assert not fits
    else:
        assert set(fits) == set(ROWS)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 4), (999, 4)])
def test_columns_hold_the_rows_of_an_average_request(rows, columns):
    assert Shape.of(quant_spec("cache_int8"), 128, rows, MEMORIES[2]).columns == columns


@every_format
def test_head_dim_256_has_at_most_16_rows_a_block(fmt):
    assert Shape.of(quant_spec(fmt), 256, 999, MEMORIES[2]).columns <= 2


# What the measurements in docs/design.md stand on.
@pytest.mark.parametrize(
    ("fmt", "warps", "stages", "blocks"),
    [
        ("none", 8, 3, 1),
        ("cache_int8", 4, 3, 2),
        ("cache_fp8", 4, 3, 2),
        ("cache_int4_zp", 4, 4, 3),
        ("block_wise_fp8", 4, 3, 2),
    ],
)
def test_decode_on_hopper_has_at_least_three_tiles_a_warp(fmt, warps, stages, blocks):
    shape = Shape.of(quant_spec(fmt), 128, 4, MEMORIES[2])
    assert (shape.warps, shape.stages, shape.blocks) == (warps, stages, blocks)


def test_a_block_of_eight_warps_gives_way_where_its_tiles_do_not_fit():
    assert Shape.of(quant_spec("none"), 128, 4, MEMORIES[1]).warps == 4
    assert Shape.of(quant_spec("none"), 256, 4, MEMORIES[2]).warps == 4


@pytest.mark.parametrize(
    ("fmt", "size"), [("none", 256), ("cache_int8", 128), ("cache_int4_zp", 64)]
)
def test_bytes_of_a_row(fmt, size):
    assert row_bytes(quant_spec(fmt), 128) == size


def test_several_columns_leave_registers_for_their_sums():
    assert Shape.of(quant_spec("cache_int4_zp"), 128, 16, MEMORIES[2]).blocks == 2
