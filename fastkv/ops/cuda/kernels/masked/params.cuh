// SPDX-License-Identifier: Apache-2.0
// Parameters and constants of masked_attention; the launcher packs them in this order.
#pragma once
#include "common/faults.cuh"
#include "common/tensor_core.cuh"

struct Params {
  const FASTKV_Q* q;        // [T, Hq, D]
  FASTKV_Q* out;            // [T, Hq, D]
  float* lse;               // [T, Hq], or null
  const FASTKV_Q* k;        // [Tk, Hkv, D]
  const FASTKV_Q* v;
  const i32* cu_seqlens_q;  // [B+1]
  const i32* cu_seqlens_k;  // [B+1]
  const i32* mask_offsets;  // [T, 2], or null
  const float* sinks;       // [Hq], or null
  i32* faults;              // null unless faults are reported
  i64 q_token, q_head, out_token, out_head;  // strides, elements
  i64 k_token, k_head, v_token, v_head;
  i32 tokens, keys, requests, kv_heads, group;  // T, Tk, B, Hkv, G
  i32 fresh;                // out is new, rows of nobody are to be written
  i32 causal, window;
  float scale, soft_cap;    // soft_cap 0: none
};
static_assert(sizeof(Params) == FASTKV_PARAMS_BYTES, "the launcher packs another struct");

using Math = FASTKV_Q;

constexpr int kD = FASTKV_D;
constexpr int kWidth = (kD + 63) / 64 * 64;  // what D is padded to with zeros
constexpr int kM = 128;                      // query rows of a tile
constexpr int kOutTiles = kWidth / 8;        // 8 columns of the result each

// K and V of so many heads lie in L2 at once, beside what else it holds.
constexpr i64 kCachedBytes = i64(24) << 20;

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
#define MINUS_INFINITY __int_as_float(0xff800000)
