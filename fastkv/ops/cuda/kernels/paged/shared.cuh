// SPDX-License-Identifier: Apache-2.0
// Shared memory of a block, in front of the warps' stages.
#pragma once
#include "paged/params.cuh"

// A state is what attention over some keys amounts to: per row the maximum m of the scores (base 2),
// l = sum 2^(s - m), and O = sum 2^(s - m) v. With a scale per token V's scale belongs to the
// exponent, which then has a maximum of its own, `top`: O = sum 2^(s + log2(scale) - top) code.
struct RowState {
  float m, l, top;
};

struct NodeTable {  // states about to be folded: their m, l, top, later what scales O
  float m[kGroup][kRows];
  float l[kGroup][kRows];
  float top[kGroup][kRows];
};

struct Shared {
  // Query fragments of each step: b0 and b1 of each lane.
  uint2 q[kDimSteps][kColumns][32];
  // One chunk, a state of each warp; O of 8 rows at a time.
  RowState warp_row[kWarps][kRows];
  union {
    float warp_sum[kWarps][8][kD + 4];
    NodeTable nodes;
  };
  // The running fold of a group; rows twice, read from one and written to the other.
  float sum[kRows][kD];
  RowState row[2][kRows];
  int low[kRows], high[kRows];  // keys that a query row sees
  float factor[kRows], zero[kRows];
  int stage_page[kWarps][kStages][2];
  const float* node[kGroup];
  u32 scratch[8];
};

constexpr int kPitch = (F::kRowBytes / 16 | 1) * 16;  // odd multiples of 16 bytes: no bank conflict
constexpr int kTileBytes = kTile * kPitch;
constexpr int kStageBytes = 2 * kTileBytes;
constexpr int kSharedBytes = (sizeof(Shared) + 127) / 128 * 128;
static_assert(kSharedBytes + kWarps * kStages * kStageBytes <= FASTKV_SHARED_BYTES,
              "the launcher asks for less shared memory");
