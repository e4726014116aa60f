// SPDX-License-Identifier: Apache-2.0
// A warp's tiles of K and V, on their way from the pages to its stages in shared memory.
#pragma once
#include "paged/shared.cuh"

// Tiles lie at multiples of kTile; the warp takes every kWarps-th of them. Tokens outside
// [low, high) and on page -1 arrive as zeros, whatever the cache holds there.
struct Stream {
  const Params& p;
  Shared& sh;
  int request, head, warp, lane;
  const u8 *k, *v;  // of the head
  int low, high;
  int first;       // the warp's first tile
  int tiles;       // that it takes
  u32 stages;      // shared address of its stages
  int held = 0;    // tile that page_ids begin with
  int page_ids, next_ids;

  static constexpr int kHeld = 32 / F::kBlocks;  // tiles whose pages the warp's lanes hold

  __device__ __forceinline__ Stream(const Params& p, Shared& sh, int low, int high, u32 stages)
      : p(p), sh(sh), request(sh.request.index), head(sh.item.head), warp(threadIdx.x / 32),
        lane(threadIdx.x % 32), k(p.k + head * p.k_strides.head),
        v(p.v + head * p.v_strides.head), low(low), high(high), stages(stages) {
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
    return checked_page(page_id(p.block_table, p.table, request, at), p.table, request, p.faults);
  }

  // Start the copies of a tile's K, and later of its V, if there is such a tile; their places in the
  // pipeline are taken anyway. The tile that had the stage must have been multiplied by all lanes.
  __device__ __forceinline__ void issue_keys(int tile) {
    if (tile < tiles) {
      if (tile - held == kHeld) {
        page_ids = next_ids, held = tile;
        next_ids = fetch_ids(tile + kHeld);
      }
      int page[F::kBlocks];
#pragma unroll
      for (int i = 0; i < F::kBlocks; ++i) {
        page[i] = __shfl_sync(~0u, page_ids, (tile - held) * F::kBlocks + i);
      }
      if (lane < F::kBlocks) {
        sh.stage_page[warp][tile % kStages][lane] = lane == 0 ? page[0] : page[F::kBlocks - 1];
      }
      copy_side(stage(tile), k, p.k_strides, page, token(tile));
    }
    commit_copies();
  }
  __device__ __forceinline__ void issue_values(int tile) {
    if (tile < tiles) {
      int at[F::kBlocks];
#pragma unroll
      for (int i = 0; i < F::kBlocks; ++i) at[i] = page(tile, i);
      copy_side(stage(tile) + kTileBytes, v, p.v_strides, at, token(tile));
    }
    commit_copies();
  }

  __device__ __forceinline__ void copy_side(u32 to, const u8* side, const SideStrides& strides,
                                            const int (&page)[F::kBlocks], int at) const {
    bool whole = at >= low && at + kTile <= high;
#pragma unroll
    for (int i = 0; i < F::kBlocks; ++i) whole = whole && page[i] >= 0;
    const u32 page_bytes = u32(strides.page), slot_bytes = u32(strides.slot);
    const u32 last_slot = (1u << p.table.page_shift) - 1;
    if (whole) {
      copy_tile(to, side, page_bytes, slot_bytes, page, u32(at), last_slot, lane);
    } else {
      copy_edge(to, side, page_bytes, slot_bytes, page[0], page[F::kBlocks - 1], at, last_slot, low,
                high);
    }
  }

  // Strides are below 2^31 bytes (the launcher sees to it), so one wide multiplication each.
  static __device__ __forceinline__ void copy_tile(u32 to, const u8* side, u32 page_bytes,
                                                   u32 slot_bytes, const int (&page)[F::kBlocks],
                                                   u32 at, u32 last_slot, int lane) {
    constexpr int kPieces = F::kRowBytes / 16;
    constexpr bool kEven = 32 % kPieces == 0;  // a lane's pieces share a column
    static_assert(kTile * kPieces % 32 == 0, "every lane copies equally many pieces");
    const u8* block[F::kBlocks];
#pragma unroll
    for (int i = 0; i < F::kBlocks; ++i) {
      block[i] = side + u64(u32(page[i])) * page_bytes;
      block[i] += u64((at + 16 * i & last_slot) + (kEven ? lane / kPieces : 0)) * slot_bytes;
      if constexpr (kEven) block[i] += lane % kPieces * 16;
    }
    const u32 mine = to + (kEven ? lane / kPieces * kPitch + lane % kPieces * 16 : 0);
#pragma unroll
    for (int i = 0; i < kTile * kPieces / 32; ++i) {
      const int piece = kEven ? 32 * i : lane + 32 * i, row = piece / kPieces;
      const int column = piece % kPieces * 16;
      // No index: arrays stay in registers only where each is known.
      const u8* from = F::kBlocks == 1 || row < 16 ? block[0] : block[F::kBlocks - 1];
      from += (row & 15) * slot_bytes + column;
      // Keeps the compiler from holding every row's offset in registers across tiles.
      asm volatile("" : "+l"(from));
      copy_async(mine + row * kPitch + column, from);
    }
  }

  // The same where some token is not there: zeros in its place. Rare, so out of the way.
  static __device__ __noinline__ void copy_edge(u32 to, const u8* side, u32 page_bytes,
                                                u32 slot_bytes, int page0, int page1, int at,
                                                u32 last_slot, int low, int high) {
    constexpr int kPieces = F::kRowBytes / 16;
#pragma unroll 1
    for (int piece = threadIdx.x % 32; piece < kTile * kPieces; piece += 32) {
      const int row = piece / kPieces, column = piece % kPieces * 16;
      const int page = row < 16 ? page0 : page1;
      const bool there = at + row >= low && at + row < high && page >= 0;
      const u8* from = side;
      if (there) {
        from += u64(u32(page)) * page_bytes + u64(u32(at + row) & last_slot) * slot_bytes + column;
      }
      copy_async(to + row * kPitch + column, from, there ? 16 : 0);
    }
  }

  // The oldest copies in flight, a tile's K or V, have arrived for all lanes.
  __device__ __forceinline__ void wait() const {
    wait_copies<2 * kStages - 1>();
    __syncwarp();
  }
  __device__ __forceinline__ u32 stage(int tile) const {
    return stages + tile % kStages * kStageBytes;
  }
  __device__ __forceinline__ int page(int tile, int block) const {
    return sh.stage_page[warp][tile % kStages][block];
  }

  __device__ __forceinline__ void fetch_scales(int tile, float& k, float& v) const {
    k = token_scale(p.k_scale, p.k_strides, tile);
    v = token_scale(p.v_scale, p.v_strides, tile);
  }

  // The scale of token `lane` of a tile: K's or V's. Not read where there is no such token.
  __device__ __forceinline__ float token_scale(const u8* scales, const SideStrides& strides,
                                               int tile) const {
    const int at = token(tile) + lane, id = page(tile, lane / 16 % F::kBlocks);
    if (tile >= tiles || id < 0 || at < low || at >= high) return 0.f;
    const i64 offset = scale_offset(strides, id, head, slot_at(p.table, at));
    return to_float(*reinterpret_cast<const FASTKV_SCALE*>(scales + offset));
  }
};
