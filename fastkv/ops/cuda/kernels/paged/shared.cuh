// SPDX-License-Identifier: Apache-2.0
// Shared memory of a block, in front of the warps' stages.
#pragma once
#include "paged/schedule.cuh"

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
  // The block's share of the work and where it is in it: the same for all threads.
  Share share;
  Request request;
  Item item;
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

// The block's share of the launch, from all requests' lengths.
__device__ __forceinline__ void find_share(const Params& p, Shared& sh) {
  u32 work = 0;
  for (int b = threadIdx.x; b < p.table.requests; b += kThreads) work += read_request(p, b).work;
  Share s;
  s.total = block_sum(work, sh.scratch);
  s.blocks = min(gridDim.x, s.total);
  const bool works = blockIdx.x < s.blocks;
  s.start = works ? s.start_of(blockIdx.x) : 0;
  s.end = works ? s.start_of(blockIdx.x + 1) : 0;
  if (threadIdx.x == 0) sh.share = s;
  u32 before = 0;
  for (int base = 0; base < p.table.requests; base += kThreads) {
    const int b = base + threadIdx.x;
    Request r;
    r.work = 0;
    if (b < p.table.requests) r = read_request(p, b);
    const u32 until = before + block_scan(r.work, sh.scratch);
    if (until > s.start && until - r.work <= s.start) {
      sh.request = r;
      sh.share.request_at = until - r.work;
    }
    if (threadIdx.x == kThreads - 1) sh.scratch[kWarps] = until;
    if (__syncthreads_or(until > s.start)) break;
    before = sh.scratch[kWarps];
    __syncthreads();
  }
}

constexpr int kPitch = (F::kRowBytes / 16 | 1) * 16;  // odd multiples of 16 bytes: no bank conflict
constexpr int kTileBytes = kTile * kPitch;
constexpr int kStageBytes = 2 * kTileBytes;
constexpr int kSharedBytes = (sizeof(Shared) + 127) / 128 * 128;
static_assert(kSharedBytes + kWarps * kStages * kStageBytes <= FASTKV_SHARED_BYTES,
              "the launcher asks for less shared memory");
