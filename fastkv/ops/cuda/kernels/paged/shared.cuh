// SPDX-License-Identifier: Apache-2.0
// Shared memory of a block, in front of the warps' stages.
#pragma once
#include "paged/schedule.cuh"

// A state is what attention over some keys amounts to: per row the maximum m of the scores (base 2),
// l = sum 2^(s - m), and O = sum 2^(s - m) v. With a scale per token O has another unit, 2^top: of
// m and of a power of two near the largest scale of V.
struct RowState {
  float m, l, top;
};

// States about to be folded: what scales the fold so far, and the state, of l and of O.
struct NodeTable {
  static constexpr int kSums = kPagedScales ? kGroup : 1;  // else O is scaled as l
  float l[kGroup][kRows];
  float old_l[kGroup][kRows], new_l[kGroup][kRows];
  float old_sum[kSums][kRows], new_sum[kSums][kRows];
};

// A tile in shared memory: rows of 16-byte pieces, one token each. ldmatrix reads a piece of each of
// 8 rows, which must lie in different banks: where the pieces of a row are a power of two, they are
// permuted by an XOR with the row; else rows are an odd number of pieces apart.
constexpr int kPieces = F::kRowBytes / 16;
static_assert(kPieces >= 2, "a row of one piece needs another permutation");
constexpr bool kPermuted = (kPieces & (kPieces - 1)) == 0;
constexpr int kPitch = kPermuted ? F::kRowBytes : (kPieces | 1) * 16;
constexpr int kTileBytes = kTile * kPitch;
constexpr int kStageBytes = 2 * kTileBytes;

// What a row's piece numbers are XORed with.
__device__ __forceinline__ constexpr u32 permutation(u32 row) {
  if (!kPermuted) return 0;
  return kPieces >= 8 ? row & 7 : row / (8 / kPieces) & (kPieces - 1);
}

// A lane's address in a tile, and the one `bytes` further along its row.
__device__ __forceinline__ u32 fragment_address(u32 tile, u32 row, u32 bytes) {
  return tile + row * kPitch + (bytes ^ permutation(row) * 16);
}
__device__ __forceinline__ u32 along(u32 address, u32 bytes) {
  return kPermuted ? address ^ bytes : address + bytes;  // a tile begins at a multiple of a row
}

// When a chunk ends, the stage that a warp fills next is free: its O waits there for the other warps'.
constexpr int kSumPitch = kD + 4;  // floats; stores of 8 lanes lie in different banks
constexpr int kPassRows = kStageBytes >= 8 * 4 * kSumPitch ? 8 : 4;  // rows at once
static_assert(kPassRows * 4 * kSumPitch <= kStageBytes, "O of a pass fits in a stage");

struct Shared {
  // The block's share of the work and where it is in it: the same for all threads.
  Share share;
  Request request;
  Item item;
  // Query fragments of each step: b0 and b1 of each lane.
  alignas(16) uint2 q[kDimSteps][kColumns][32];
  // One chunk: a state of each warp, O of kPassRows rows at a time.
  RowState warp_row[kWarps][kRows];
  const float* warp_sum[kWarps];  // [kPassRows][kSumPitch] in the warp's free stage
  // The running fold of a group; rows twice, read from one and written to the other. When states of
  // several blocks are folded, it has been put where it belongs.
  // Before the first chunk ends, the item's rows of q, as they are.
  union {
    alignas(16) float sum[kRows][kD];
    NodeTable nodes;
    FASTKV_Q query[kRows][kD];
  };
  RowState row[2][kRows];
  int low[kRows], high[kRows];  // keys that a query row sees
  float factor[kRows], shift[kRows];          // from products to scores
  float sink[kRows];                          // in base 2, -inf where there is none
  float value_scale[kStaticScales ? kD : 1];  // dequant and zero point of V's channels
  float value_zero[kZeroPoints ? kD : 1];
  float key_scale[kKeyChannels ? kD : 1];     // and of K's
  float key_zero[kZeroPoints ? kD : 1];
  int stage_page[kWarps][kStages][2];
  // The words that hold the scales of K and of V of each of the tile's tokens.
  u32 stage_scales[kPagedScales ? kWarps * kStages : 1][2][kPagedScales ? 32 : 1];
  const float* node[kGroup];
  u32 scratch[kWarps];
  bool arrived_last;
};

// The block's share of the launch, from all requests' lengths: as many consecutive requests a thread
// as it takes, one scan over the threads, and one of them finds the item that the share begins with.
__device__ __forceinline__ void find_share(const Params& p, Shared& sh) {
  const int each = ceil_div(p.table.requests, kThreads), first = int(threadIdx.x) * each;
  Request r;
  u32 mine = 0;
  for (int i = first; i < min(first + each, p.table.requests); ++i) {
    r = read_request(p, i);
    mine += r.work;
  }
  u32 until = warp_scan(mine), total = 0;
  if (threadIdx.x % 32 == 31) sh.scratch[threadIdx.x / 32] = until;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < int(threadIdx.x / 32)) until += sh.scratch[w];
    total += sh.scratch[w];
  }
  Share s(total, gridDim.x);
  if (s.start == s.end) {
    if (threadIdx.x == 0) sh.share = s;
  } else if (until > s.start && until - mine <= s.start) {
    s.request_at = until - mine;
    if (each > 1) r.index = first - 1, r.work = 0;  // step through this thread's requests
    sh.item = find_item(p, s, r, s.start);
    sh.request = r, sh.share = s;
  }
  __syncthreads();
}

// Stages begin at a multiple of a row.
constexpr int kAlignment = F::kRowBytes > 128 ? F::kRowBytes : 128;
constexpr int kSharedBytes = (sizeof(Shared) + kAlignment - 1) / kAlignment * kAlignment;
static_assert(kSharedBytes + kWarps * kStages * kStageBytes <= FASTKV_SHARED_BYTES,
              "the launcher asks for less shared memory");
