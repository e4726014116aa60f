// SPDX-License-Identifier: Apache-2.0
// Parameters and constants of paged_attention; the launcher packs them in this order.
#pragma once
#include "common/multipliers.cuh"
#include "common/paging.cuh"
#include FASTKV_CODEC_HEADER

// A format without scales leaves their dtypes open.
#ifndef FASTKV_SCALE
#define FASTKV_SCALE float
#endif
#ifndef FASTKV_STATIC
#define FASTKV_STATIC float
#define FASTKV_PER_CHANNEL 0
#endif

struct Params {
  const FASTKV_Q* q;         // [T, Hq, D]
  FASTKV_Q* out;             // [T, Hq, D]
  float* lse;                // [T, Hq], or null
  const u8* k;               // [N, Hkv, P, D_storage]
  const u8* v;
  const u8* k_scale;         // [N, Hkv, P], or null
  const u8* v_scale;
  StaticPointers dequant;    // [Hkv] or [Hkv, D] each, or null
  const i32* cu_seqlens_q;   // [B+1]
  const i32* cache_seqlens;  // [B]
  const i32* block_table;    // [B, M]
  const i32* mask_offsets;   // [T, 2], or null
  const float* sinks;        // [Hq], or null
  float* states;             // workspace: see fold.cuh
  u32* counters;             // two a block, zero between launches
  i32* faults;               // null unless faults are reported
  SideStrides k_strides, v_strides;
  TableShape table;
  i64 q_token, q_head, out_token, out_head;  // strides, elements
  i32 tokens, kv_heads, group;  // T, Hkv, G
  i32 max_groups;               // of an item
  i32 causal, window, fresh;  // fresh: out is new, rows of nobody are to be written
  float scale, soft_cap;      // soft_cap 0: none
  i32 more_padding;
};
static_assert(sizeof(Params) == FASTKV_PARAMS_BYTES, "the launcher packs another struct");

using F = Codec::Fragments<FASTKV_D>;
using Math = F::Math;

constexpr int kD = FASTKV_D;
constexpr int kWarps = FASTKV_WARPS;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16 * F::kBlocks;      // tokens of a warp's tile
constexpr int kStages = FASTKV_STAGES;      // tiles of K and V that a warp has in flight, plus one
constexpr int kColumns = FASTKV_COLUMNS;    // 8 query rows each: n of the products
constexpr int kRows = 8 * kColumns;
constexpr int kDimSteps = kD / 16;

constexpr bool kPagedScales = Codec::kScales == Scales::kPaged;
constexpr bool kStaticScales = Codec::kScales == Scales::kStatic;
constexpr bool kZeroPoints = Codec::kZeroPoint;
constexpr bool kPerChannel = FASTKV_PER_CHANNEL;
constexpr bool kKeyChannels = kStaticScales && kPerChannel;
constexpr bool kShifts = kZeroPoints || F::kBias != 0.f;  // a code's product is not its own

// The split of a request, from its length alone, so that its rows are the same in every batch.
constexpr int kLeastChunk = FASTKV_LEAST_CHUNK;  // tokens, a multiple of 128
constexpr int kSplit = FASTKV_SPLIT;             // chunks times KV heads, about
constexpr int kGroup = 16;                       // chunks whose states fold first

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
#define MINUS_INFINITY __int_as_float(0xff800000)

// Element i of an array of static scales or zero points.
__device__ __forceinline__ float static_at(const void* array, int i) {
  return to_float(static_cast<const FASTKV_STATIC*>(array)[i]);
}
