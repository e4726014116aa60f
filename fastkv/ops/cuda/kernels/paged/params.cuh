// SPDX-License-Identifier: Apache-2.0
// Parameters and constants of paged_attention; the launcher packs them in this order.
#pragma once
#include "common/numbers.cuh"
#include "common/faults.cuh"
#include FASTKV_CODEC_HEADER

struct Params {
  const FASTKV_Q* q;        // [T, Hq, D]
  FASTKV_Q* out;            // [T, Hq, D]
  float* lse;               // [T, Hq], or null
  const u8* k;              // [N, Hkv, P, D_storage]
  const u8* v;
  const i32* cu_seqlens_q;  // [B+1]
  const i32* cache_seqlens; // [B]
  const i32* block_table;   // [B, M]
  const i32* mask_offsets;  // [T, 2], or null
  const float* sinks;       // [Hq], or null
  const FASTKV_SCALE* k_scale;  // [N, Hkv, P], or null
  const FASTKV_SCALE* v_scale;
  const FASTKV_STATIC* k_dequant;  // [Hkv] or [Hkv, D], or null
  const FASTKV_STATIC* v_dequant;
  const FASTKV_STATIC* k_zp;
  const FASTKV_STATIC* v_zp;
  float* states;            // workspace: see fold.cuh
  u32* counters;            // two a block, zero between launches
  i32* faults;              // null unless faults are reported
  i64 k_page, k_head, k_slot, v_page, v_head, v_slot;  // strides, bytes
  i64 k_scale_page, k_scale_head, k_scale_slot;        // strides, elements
  i64 v_scale_page, v_scale_head, v_scale_slot;
  i64 q_token, q_head, out_token, out_head, table_row;
  i32 T, B, M, N, Hkv, G, page_shift, causal, window, fresh;
  float scale, soft_cap;    // soft_cap 0: none
};
static_assert(sizeof(Params) == FASTKV_PARAMS_BYTES, "the launcher packs another struct");

using F = Codec::Fragments<FASTKV_D>;
using Math = F::Math;

constexpr int kD = FASTKV_D;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16 * F::kBlocks;      // tokens of a warp's tile
constexpr int kStages = FASTKV_STAGES;      // tiles of K and V that a warp has in flight, plus one
constexpr int kColumns = FASTKV_COLUMNS;    // 8 query rows each: n of the products
constexpr int kRows = 8 * kColumns;
constexpr int kDimSteps = kD / 16;

constexpr bool kPagedScales = Codec::kPagedScales;
constexpr bool kStaticScales = Codec::kStaticScales;
constexpr bool kZeroPoints = Codec::kZeroPoints;
constexpr bool kPerChannel = FASTKV_PER_CHANNEL;

// The split of a request, from its length alone, so that its rows are the same in every batch.
constexpr int kLeastChunk = FASTKV_LEAST_CHUNK;  // tokens, a multiple of 128
constexpr int kSplit = FASTKV_SPLIT;             // chunks times KV heads, about
constexpr int kGroup = 16;                       // chunks whose states fold first
constexpr int kMaxGroups = FASTKV_MAX_GROUPS;    // of an item, from Hkv

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
#define MINUS_INFINITY __int_as_float(0xff800000)
