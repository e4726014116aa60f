// SPDX-License-Identifier: Apache-2.0
// A warp's tiles of K and V, on their way from the pages to its stages in shared memory.
#pragma once
#include "paged/schedule.cuh"
#include "paged/shared.cuh"

// Tiles lie at multiples of kTile; the warp takes every kWarps-th of them. Tokens outside
// [low, high) and on page -1 arrive as zeros, whatever the cache holds there.
struct Stream {
  const Params& p;
  Shared& sh;
  int request, head, warp, lane;
  int low, high;
  int first;       // the warp's first tile
  int tiles;       // that it takes
  u32 stages;      // shared address of its stages
  int issued = 0;
  int held = 0;    // tile that page_ids begin with
  int page_ids, next_ids;

  static constexpr int kHeld = 32 / F::kBlocks;  // tiles whose pages the warp's lanes hold

  __device__ __forceinline__ Stream(const Params& p, Shared& sh, int request, int head, int low,
                                    int high, u32 stages)
      : p(p), sh(sh), request(request), head(head), warp(threadIdx.x / 32),
        lane(threadIdx.x % 32), low(low), high(high), stages(stages) {
    const int begin = low / kTile;
    first = begin + ((warp - begin) & (kWarps - 1));
    tiles = max(0, ceil_div(ceil_div(high, kTile) - first, kWarps));
    page_ids = fetch_ids(0);
    next_ids = fetch_ids(kHeld);
  }

  __device__ __forceinline__ int token(int tile) const { return (first + tile * kWarps) * kTile; }

  // Lane by lane: the page of each 16 tokens of the tiles from `tile` on.
  __device__ __forceinline__ int fetch_ids(int tile) const {
    const int at = token(tile + lane / F::kBlocks) + lane % F::kBlocks * 16;
    if (at >= high || at + 16 <= low) return -1;
    const int id = p.block_table[request * p.table_row + (at >> p.page_shift)];
    if (id >= 0 && id < p.N) return id;
    if (p.faults != nullptr && id != -1) report_fault(p.faults, kFaultPage, request);
    return -1;
  }

  // Start the copy of the next tile, if there is one; its place in the pipeline is taken anyway.
  __device__ __forceinline__ void issue() {
    if (issued < tiles) {
      if (issued - held == kHeld) {
        page_ids = next_ids, held = issued;
        next_ids = fetch_ids(issued + kHeld);
      }
      int page[F::kBlocks];
#pragma unroll
      for (int i = 0; i < F::kBlocks; ++i) {
        page[i] = __shfl_sync(~0u, page_ids, (issued - held) * F::kBlocks + i);
      }
      const int stage = issued % kStages, at = token(issued);
      if (lane < F::kBlocks) sh.stage_page[warp][stage][lane] = page[lane % F::kBlocks];
      const u32 to = stages + stage * kStageBytes;
      bool whole = at >= low && at + kTile <= high;
#pragma unroll
      for (int i = 0; i < F::kBlocks; ++i) whole = whole && page[i] >= 0;
      if (whole) {
        copy_tile<true>(to, p.k + head * p.k_head, p.k_page, p.k_slot, page, at);
        copy_tile<true>(to + kTileBytes, p.v + head * p.v_head, p.v_page, p.v_slot, page, at);
      } else {
        copy_tile<false>(to, p.k + head * p.k_head, p.k_page, p.k_slot, page, at);
        copy_tile<false>(to + kTileBytes, p.v + head * p.v_head, p.v_page, p.v_slot, page, at);
      }
    }
    ++issued;
    commit_copies();
  }

  template <bool kWhole>
  __device__ __forceinline__ void copy_tile(u32 to, const u8* side, i64 page_stride,
                                            i64 slot_stride, const int (&page)[F::kBlocks],
                                            int at) const {
    const u8* block[F::kBlocks];
#pragma unroll
    for (int i = 0; i < F::kBlocks; ++i) {
      const int slot = (at + 16 * i) & ((1 << p.page_shift) - 1);
      block[i] = side + max(page[i], 0) * page_stride + slot * slot_stride;
    }
    constexpr int kPieces = F::kRowBytes / 16;
    static_assert(kTile * kPieces % 32 == 0, "every lane copies equally many pieces");
#pragma unroll
    for (int i = 0; i < kTile * kPieces / 32; ++i) {
      const int piece = lane + 32 * i, row = piece / kPieces, column = piece % kPieces * 16;
      const u8* from = block[F::kBlocks == 1 ? 0 : row / 16] + (row & 15) * slot_stride + column;
      const u32 where = to + row * kPitch + column;
      if constexpr (kWhole) {
        copy_async(where, from);
      } else {
        const bool there = at + row >= low && at + row < high &&
                           page[F::kBlocks == 1 ? 0 : row / 16] >= 0;
        copy_async(where, there ? from : side, there ? 16 : 0);
      }
    }
  }

  // Tile `tile` has arrived, and the stage of the tile before it is free.
  __device__ __forceinline__ void wait() const {
    wait_copies<kStages - 2>();
    __syncwarp();
  }
  __device__ __forceinline__ u32 stage(int tile) const {
    return stages + tile % kStages * kStageBytes;
  }
  __device__ __forceinline__ int page(int tile, int block) const {
    return sh.stage_page[warp][tile % kStages][block];
  }

  // The scale of token `lane` of a tile: K's or V's. Not read where there is no such token.
  __device__ __forceinline__ float token_scale(const FASTKV_SCALE* scales, i64 page_stride,
                                               i64 head_stride, i64 slot_stride, int tile) const {
    const int at = token(tile) + lane, id = page(tile, lane / 16 % F::kBlocks);
    if (tile >= tiles || id < 0 || at < low || at >= high) return 0.f;
    const int slot = at & ((1 << p.page_shift) - 1);
    return to_float(scales[id * page_stride + head * head_stride + slot * slot_stride]);
  }
};
