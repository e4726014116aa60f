// SPDX-License-Identifier: Apache-2.0
// Where a token lies: its request, its page, and the bytes of its heads.
#pragma once

#include "common/faults.cuh"
#include "common/numbers.cuh"

constexpr u32 kAllLanes = 0xffffffffu;

// Strides of K or V and of its paged scales (0 without them), in bytes.
struct SideStrides {
  i64 page, head, slot;
  i64 scale_page, scale_head, scale_slot;
};

__device__ __forceinline__ i64 row_offset(const SideStrides& s, i64 page, i32 head, i32 slot) {
  return page * s.page + head * s.head + slot * s.slot;
}

__device__ __forceinline__ i64 scale_offset(const SideStrides& s, i64 page, i32 head, i32 slot) {
  return page * s.scale_page + head * s.scale_head + slot * s.scale_slot;
}

// block_table [B, M]; strides in elements.
struct TableShape {
  i64 row, column;
  i32 columns, pages;  // M and N
  i32 page_shift;      // log2(P)
  i32 requests;        // B
};

// The page of a position within the table; -1 where there is none, or where the id is no page
// (which is reported).
__device__ __forceinline__ i32 page_at(const i32* table, const TableShape& shape, i32 request,
                                       i32 position, i32* faults) {
  const i64 column = position >> shape.page_shift;
  const i32 page = table[request * shape.row + column * shape.column];
  if (page < -1 || page >= shape.pages) {
    report_fault(faults, kFaultPage, request);
    return -1;
  }
  return page;
}

// Positions that the table has room for.
__device__ __forceinline__ i64 capacity(const TableShape& shape) {
  return i64(shape.columns) << shape.page_shift;
}

__device__ __forceinline__ i32 slot_at(const TableShape& shape, i32 position) {
  return position & ((1 << shape.page_shift) - 1);
}

// Of ascending `sums[0 .. count)`, the index of the last that is at most x, or -1. A whole warp
// asks with one x; each round reads 32 of them and narrows the search to a 32nd. Whatever the sums
// hold, it ends within bounds.
__device__ __forceinline__ i32 last_at_most(const i32* sums, i32 count, i32 x) {
  const i32 lane = threadIdx.x % 32;
  i32 first = 0;
  while (count > 32) {
    const i32 step = (count + 31) / 32;
    const bool is_below = lane * step < count && sums[first + lane * step] <= x;
    const i32 below = __popc(__ballot_sync(kAllLanes, is_below));
    if (below == 0) return first - 1;
    first += (below - 1) * step;
    count = min(step, count - (below - 1) * step);
  }
  const bool is_below = lane < count && sums[first + lane] <= x;
  return first - 1 + __popc(__ballot_sync(kAllLanes, is_below));
}
