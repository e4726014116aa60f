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

// States about to be folded: what scales the fold so far, and the state, of l and of O.
struct NodeTable {
  float l[kGroup][kRows];
  float old_l[kGroup][kRows], new_l[kGroup][kRows];
  float old_sum[kGroup][kRows], new_sum[kGroup][kRows];
};

// Rows whose O the warps put together at once.
constexpr int kPassRows = kD > 128 ? 2 : kColumns == 4 ? 4 : 8;

struct Shared {
  // The block's share of the work and where it is in it: the same for all threads.
  Share share;
  Request request;
  Item item;
  // Query fragments of each step: b0 and b1 of each lane.
  uint2 q[kDimSteps][kColumns][32];
  // One chunk, a state of each warp; O of kPassRows rows at a time.
  RowState warp_row[kWarps][kRows];
  union {
    float warp_sum[kWarps][kPassRows][kD + 4];
    NodeTable nodes;
  };
  // The running fold of a group; rows twice, read from one and written to the other.
  float sum[kRows][kD];
  RowState row[2][kRows];
  int low[kRows], high[kRows];  // keys that a query row sees
  float factor[kRows], shift[kRows];          // from products to scores
  float sink[kRows];                          // in base 2, -inf where there is none
  float value_scale[kStaticScales ? kD : 1];  // dequant and zero point of V's channels
  float value_zero[kZeroPoints ? kD : 1];
  int stage_page[kWarps][kStages][2];
  const float* node[kGroup];
  u32 scratch[8];
};

// Requests base .. base + kThreads - 1, one a thread: the chunks up to and with the thread's own.
__device__ __forceinline__ u32 scan_requests(const Params& p, Shared& sh, int base, u32 before,
                                             Request& r) {
  r.work = 0;
  if (base + threadIdx.x < p.table.requests) r = read_request(p, base + threadIdx.x);
  const u32 until = before + block_scan(r.work, sh.scratch);
  if (threadIdx.x == kThreads - 1) sh.scratch[kWarps] = until;
  __syncthreads();
  return until;
}

// The block's share of the launch, from all requests' lengths: first all work, then where the
// share begins. Up to kThreads requests are read once.
__device__ __forceinline__ void find_share(const Params& p, Shared& sh) {
  Request r;
  u32 until = 0, total = 0;
  for (int base = 0; base < p.table.requests; base += kThreads) {
    until = scan_requests(p, sh, base, total, r);
    total = sh.scratch[kWarps];
    __syncthreads();
  }
  Share s;
  s.total = total;
  s.blocks = min(gridDim.x, total);
  const bool works = blockIdx.x < s.blocks;
  s.start = works ? s.start_of(blockIdx.x) : 0;
  s.end = works ? s.start_of(blockIdx.x + 1) : 0;
  if (threadIdx.x == 0) sh.share = s;
  __syncthreads();
  u32 before = 0;
  for (int base = 0; base < p.table.requests; base += kThreads) {
    if (p.table.requests > kThreads) until = scan_requests(p, sh, base, before, r);
    if (until > s.start && until - r.work <= s.start) {
      sh.request = r;
      sh.share.request_at = until - r.work;
    }
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
