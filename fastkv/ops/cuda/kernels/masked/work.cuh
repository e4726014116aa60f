// SPDX-License-Identifier: Apache-2.0
// Who does what: tiles of kM query rows of one head, and the keys that they see.
//
// Whatever a row may see, by causality, window and mask_offsets together, is one interval
// [low, high) of its request's keys. A tile of rows loads the keys from the first that one of its
// rows sees to the last; tiles of keys that all rows see need no mask.
#pragma once
#include "masked/params.cuh"

struct Request {
  int index;
  int first, rows;        // in q
  int first_key, length;  // in k and v
};

// A tile of rows, and what it sees.
struct Work {
  Request request;
  int head, row, rows;        // of q; first row within the request, and how many
  int low, high;              // keys that some row sees
  int clean_low, clean_high;  // keys that all rows see
  bool valid;

  // The keys [from, from + keys) need no mask.
  __device__ __forceinline__ bool is_clean(int from, int keys) const {
    return rows == kM && from >= clean_low && from + keys <= clean_high;
  }
};

// Keys that a row of the request sees, empty ones as low == high.
__device__ __forceinline__ int2 keys_of(const Params& p, const Request& r, int row) {
  const int position = r.length - r.rows + row;
  int low = max(position - p.window + 1, 0);
  int high = p.causal ? min(position + 1, r.length) : r.length;
  if (p.mask_offsets != nullptr) {
    const int2 seen = *reinterpret_cast<const int2*>(p.mask_offsets + 2 * i64(r.first + row));
    if (seen.x < 0 || seen.x > seen.y || seen.y > r.length) {
      report_fault(p.faults, kFaultInterval, r.index);
    }
    low = max(low, seen.x), high = min(high, seen.y);
  }
  return {low, max(high, low)};
}

__device__ __forceinline__ Request read_request(const Params& p, int b) {
  Request r = {b, 0, 0, 0, 0};
  if (b >= p.requests) return r;
  const int first = p.cu_seqlens_q[b], last = p.cu_seqlens_q[b + 1];
  const int first_key = p.cu_seqlens_k[b], last_key = p.cu_seqlens_k[b + 1];
  if (first < 0 || last < first || last > p.tokens) report_fault(p.faults, kFaultQuerySum, b);
  if (first_key < 0 || last_key < first_key || last_key > p.keys) {
    report_fault(p.faults, kFaultSegment, b);
  }
  r.first = min(max(first, 0), p.tokens);
  r.rows = min(max(last, r.first), p.tokens) - r.first;
  r.first_key = min(max(first_key, 0), p.keys);
  r.length = min(max(last_key, r.first_key), p.keys) - r.first_key;
  return r;
}

// A block's tile of each round: every second round from the other end, so that no block has the
// longest tile of all of them.
__device__ __forceinline__ int tile_of(int round) {
  return round * int(gridDim.x) + int(round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// Walks the requests of the batch, 32 at a time; every warp of a block finds the same.
struct Walk {
  const Params& p;
  int request = 0;  // of the 32 that are next
  int base = 0;     // tiles of those before it

  __device__ __forceinline__ explicit Walk(const Params& p) : p(p) {}

  // Tile t, which is behind the last one asked for.
  __device__ __forceinline__ Work find(int t) {
    const int lane = threadIdx.x % 32, heads = p.kv_heads * p.group;
    Work w;
    w.valid = false;
    while (request < p.requests) {
      const Request mine = read_request(p, request + lane);
      const int tiles = (mine.rows + kM - 1) / kM * heads;
      int until = tiles;
#pragma unroll
      for (int i = 1; i < 32; i *= 2) {
        const int before = __shfl_up_sync(~0u, until, i);
        if (lane >= i) until += before;
      }
      const u32 past = __ballot_sync(~0u, base + until > t);
      if (past != 0) {
        const int at = __ffs(past) - 1;
        w.request = {request + at, __shfl_sync(~0u, mine.first, at), __shfl_sync(~0u, mine.rows, at),
                     __shfl_sync(~0u, mine.first_key, at), __shfl_sync(~0u, mine.length, at)};
        place(w, t - base - __shfl_sync(~0u, until - tiles, at));
        find_bounds(w);
        w.valid = true;
        break;
      }
      base += __shfl_sync(~0u, until, 31);
      request += 32;
    }
    return w;
  }

  // The request's tile `at`: as many KV heads side by side as have K and V in L2, and of these all
  // heads' rows of one tile before the next, those that see most first.
  __device__ __forceinline__ void place(Work& w, int at) const {
    const Request& r = w.request;
    const int row_tiles = (r.rows + kM - 1) / kM;
    const int fit = int(min(kCachedBytes / (i64(max(r.length, 1)) * (4 * kD)), i64(p.kv_heads)));
    const int wide = max(fit, 1) * p.group;
    const int section = at / (wide * row_tiles), in = at - section * (wide * row_tiles);
    const int heads = min(wide, p.kv_heads * p.group - section * wide);
    w.head = section * wide + in % heads;
    w.row = (row_tiles - 1 - in / heads) * kM;
    w.rows = min(r.rows - w.row, kM);
  }

  __device__ __forceinline__ void find_bounds(Work& w) const {
    const int lane = threadIdx.x % 32;
    w.low = 0x7fffffff, w.high = 0, w.clean_low = 0, w.clean_high = 0x7fffffff;
    for (int row = lane; row < w.rows; row += 32) {
      const int2 keys = keys_of(p, w.request, w.row + row);
      if (keys.x < keys.y) w.low = min(w.low, keys.x), w.high = max(w.high, keys.y);
      w.clean_low = max(w.clean_low, keys.x), w.clean_high = min(w.clean_high, keys.y);
    }
    w.low = __reduce_min_sync(~0u, w.low), w.high = __reduce_max_sync(~0u, w.high);
    w.clean_low = __reduce_max_sync(~0u, w.clean_low);
    w.clean_high = __reduce_min_sync(~0u, w.clean_high);
    w.low = min(w.low, w.high);  // no row sees anything
  }
};
