// SPDX-License-Identifier: Apache-2.0
// A warp's tiles of K and V, on their way from the pages to its stages in shared memory.
#pragma once
#include "paged/shared.cuh"

// The element at `from`, of the word around it.
__device__ __forceinline__ float element_of(u32 word, const u8*, float) {
  return __uint_as_float(word);
}
template <class T>
__device__ __forceinline__ float element_of(u32 word, const u8* from, T type) {
  return u64(from) & 2 ? high_float(word, type) : low_float(word, type);
}

// Tiles lie at multiples of kTile; the warp takes every kWarps-th of them. Tokens outside
// [low, high) and on page -1 arrive as zeros, whatever the cache holds there.
struct Stream {
  const Params& p;
  Shared& sh;
  int request, head, warp, lane;
  const u8 *k, *v;  // of the head, at the lane's place
  int low, high;
  int first;       // the warp's first tile
  int tiles;       // that it takes
  u32 stages;      // shared address of its stages
  int issued = 0;
  int held = 0;    // tile that page_ids begin with
  int page_ids, next_ids;

  static constexpr int kHeld = 32 / F::kBlocks;  // tiles whose pages the warp's lanes hold

  __device__ __forceinline__ Stream(const Params& p, Shared& sh, int low, int high, u32 stages)
      : p(p), sh(sh), request(sh.request.index), head(sh.item.head), warp(threadIdx.x / 32),
        lane(threadIdx.x % 32), k(start_of(p.k, p.k_strides)), v(start_of(p.v, p.v_strides)),
        low(low), high(high), stages(stages) {
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
      if (lane < F::kBlocks) {
        sh.stage_page[warp][issued % kStages][lane] = lane == 0 ? page[0] : page[F::kBlocks - 1];
      }
      const int at = token(issued);
      const u32 to = stage(issued);
      bool whole = at >= low && at + kTile <= high;
#pragma unroll
      for (int i = 0; i < F::kBlocks; ++i) whole = whole && page[i] >= 0;
      if (whole) {
        copy_tile<true>(to, k, p.k_strides, page, at);
        copy_tile<true>(to + kTileBytes, v, p.v_strides, page, at);
      } else {
#pragma unroll 1
        for (int side = 0; side < 2; ++side) {  // rare: less code is worth more than time
          copy_tile<false>(to + side * kTileBytes, side == 0 ? k : v,
                           side == 0 ? p.k_strides : p.v_strides, page, at);
        }
      }
      if constexpr (kPagedScales) copy_scales(issued, page);
    }
    ++issued;
    commit_copies();
  }

  static constexpr bool kEven = 32 % kPieces == 0;  // a lane's pieces share a column
  static constexpr int kRowsAtOnce = kEven ? 32 / kPieces : 1;
  static_assert(kTile * kPieces % 32 == 0, "every lane copies equally many pieces");

  __device__ __forceinline__ static u32 slot_bytes(const SideStrides& strides) {
    return FASTKV_SLOT_BYTES ? FASTKV_SLOT_BYTES : u32(strides.slot);
  }

  // The head's first page, or what is at the lane's own place in it.
  __device__ __forceinline__ const u8* start_of(const u8* side, const SideStrides& strides) const {
    side += head * strides.head;
    if (!kEven) return side;
    return side + u32(lane / kPieces) * slot_bytes(strides) + lane % kPieces * 16;
  }

  // Strides are below 2^31 bytes (the launcher sees to it), so one wide multiplication each.
  template <bool kWhole>
  __device__ __forceinline__ void copy_tile(u32 to, const u8* side, const SideStrides& strides,
                                            const int (&page)[F::kBlocks], int at) const {
    const u32 slot = slot_bytes(strides), last_slot = (1u << p.table.page_shift) - 1;
    const u8* block[F::kBlocks];
#pragma unroll
    for (int i = 0; i < F::kBlocks; ++i) {
      block[i] = side + u64(u32(kWhole ? page[i] : max(page[i], 0))) * u32(strides.page);
      block[i] += u64(u32(at + 16 * i) & last_slot) * slot;
    }
    const int first = kEven ? lane / kPieces : 0;
    const u32 mine =
        to + (kEven ? first * kPitch + (lane % kPieces ^ permutation(first)) * 16 : 0);
#pragma unroll
    for (int i = 0; i < kTile * kPieces / 32; ++i) {
      const int piece = kEven ? 0 : lane + 32 * i;
      const int row = kEven ? kRowsAtOnce * i : piece / kPieces;
      const int column = piece % kPieces * 16;
      // No index: arrays stay in registers only where each is known.
      const u8* from = F::kBlocks == 1 || row < 16 ? block[0] : block[F::kBlocks - 1];
      from += (row & 15) * slot + column;
      // Keeps the compiler from holding every row's offset in registers across tiles.
      if constexpr (FASTKV_SLOT_BYTES == 0) asm volatile("" : "+l"(from));
      // The lane's first row and this one share no bit of the permutation, so it splits too.
      const u32 where = (kEven ? mine ^ permutation(row) * 16 : mine + column) + row * kPitch;
      if constexpr (kWhole) {
        copy_async(where, from);
      } else {
        const int key = at + row + first;
        const int id = F::kBlocks == 1 || row < 16 ? page[0] : page[F::kBlocks - 1];
        const bool there = key >= low && key < high && id >= 0;
        copy_async(where, there ? from : side, there ? 16 : 0);
      }
    }
  }

  // The next tile has arrived for all lanes, and the stage of the one before it is free.
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

  // The lane's token of a tile, and where its scale lies; a scale of 2 bytes comes with its word.
  __device__ __forceinline__ const u8* scale_at(const u8* scales, const SideStrides& strides,
                                                int at, int id) const {
    scales += head * strides.scale_head;
    scales += u64(u32(max(id, 0))) * u32(strides.scale_page);
    return scales + u64(u32(slot_at(p.table, at))) * u32(strides.scale_slot);
  }
  __device__ __forceinline__ u32 scale_word(int tile, int side) const {
    return shared_address(&sh.stage_scales[warp * kStages + tile % kStages][side][lane]);
  }

  __device__ __forceinline__ void copy_scales(int tile, const int (&page)[F::kBlocks]) const {
    const int at = token(tile) + lane;
    const int id = lane < 16 || F::kBlocks == 1 ? page[0] : page[F::kBlocks - 1];
    const u32 bytes = lane < kTile && id >= 0 && at >= low && at < high ? 4 : 0;
    const u64 word = ~u64(3);
    const u64 k = u64(scale_at(p.k_scale, p.k_strides, at, id)) & word;
    const u64 v = u64(scale_at(p.v_scale, p.v_strides, at, id)) & word;
    copy_word_async(scale_word(tile, 0), reinterpret_cast<const void*>(k), bytes);
    copy_word_async(scale_word(tile, 1), reinterpret_cast<const void*>(v), bytes);
  }

  // The scales of token `lane` of a tile that has arrived; 0 where there is no such token.
  __device__ __forceinline__ void load_scales(int tile, float& k, float& v) const {
    k = load_scale(tile, 0, p.k_scale, p.k_strides);
    v = load_scale(tile, 1, p.v_scale, p.v_strides);
  }
  __device__ __forceinline__ float load_scale(int tile, int side, const u8* scales,
                                              const SideStrides& strides) const {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(scale_word(tile, side)));
    const int at = token(tile) + lane, id = page(tile, lane / 16 % F::kBlocks);
    return element_of(word, scale_at(scales, strides, at, id), FASTKV_SCALE{});
  }
};
