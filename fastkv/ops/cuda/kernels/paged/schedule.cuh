// SPDX-License-Identifier: Apache-2.0
// Who does what: every block finds its share of the work from the lengths in device memory.
//
// A request's query rows (token-major, its G heads of one KV head together) fall into row tiles of
// kRows. An item is one (request, row tile, KV head): its keys are cut into chunks at multiples of
// C(L). The chunks of all items, in order, are split evenly over the blocks.
#pragma once
#include "paged/params.cuh"

struct Request {
  int index;        // b
  int first;        // its first row in q
  int rows;         // n * G
  int cached;       // tokens before this step
  int length;       // L, keys
  int chunk;        // C(L), tokens
  int chunk_first;  // first chunk that a row sees
  int chunks;       // of an item, at least 1
  u32 work;         // chunks of all its items
};

// One (request, row tile, KV head), and where it stands.
struct Item {
  int head;
  int row;        // first row of its tile, within the request
  int rows;       // of the tile, at most kRows
  u32 at;         // its chunk 0 in the launch's order
  int chunks;
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// x / y, without the hundred cycles where the quotient is 0 or y is the least chunk: most often.
__device__ __forceinline__ int quotient(int x, int y) { return x < y ? 0 : x / y; }
__device__ __forceinline__ int in_chunks(int x, int chunk) {
  return chunk == kLeastChunk ? x / kLeastChunk : x / chunk;
}

__device__ __forceinline__ int chunk_tokens(int length, int heads) {
  const int even = ceil_div(int((i64(length) * heads + kSplit - 1) / kSplit), 128) * 128;
  return max(kLeastChunk, even);
}

__device__ __forceinline__ Request read_request(const Params& p, int b) {
  Request r;
  r.index = b;
  const int limit = int(min(capacity(p.table), i64(1) << 30));
  const int first = p.cu_seqlens_q[b], last = p.cu_seqlens_q[b + 1];
  r.first = min(max(first, 0), p.tokens);
  const int tokens = min(max(last, r.first), p.tokens) - r.first;
  if (first < 0 || last < first || last > p.tokens) report_fault(p.faults, kFaultQuerySum, b);
  const int cached = p.cache_seqlens[b];
  r.cached = min(max(cached, 0), limit);
  r.length = min(r.cached + tokens, limit);
  r.rows = tokens * p.group;
  r.chunk = chunk_tokens(r.length, p.kv_heads);
  r.chunk_first = in_chunks(max(r.cached - p.window + 1, 0), r.chunk);
  r.chunks = max(1, in_chunks(r.length + r.chunk - 1, r.chunk) - r.chunk_first);
  r.work = u32(ceil_div(r.rows, kRows)) * p.kv_heads * r.chunks;
  if (cached < 0 || i64(cached) + tokens > limit) report_fault(p.faults, kFaultLength, b);
  return r;
}

// Inclusive prefix sum over the warp's lanes.
__device__ __forceinline__ u32 warp_scan(u32 x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const u32 y = __shfl_up_sync(~0u, x, i);
    if (lane >= i) x += y;
  }
  return x;
}

// The launch's chunks over its blocks: `each` a block, and one more for the first `longer` ones.
struct Share {
  u32 total, each, longer;
  u32 start, end;  // of this block
  u32 request_at;  // the first chunk of the current request

  Share() = default;
  __device__ __forceinline__ Share(u32 total, u32 blocks) : total(total), request_at(0) {
    each = quotient(total, blocks), longer = total - each * blocks;
    const u32 most = each + (longer != 0);
    // Multiples of a power of two, so that items fall to few blocks, or whole ones to one, where
    // that leaves at most a sixteenth of the blocks without work.
#pragma unroll 1
    for (u32 unit = kGroup; unit > 1; unit /= 2) {
      const u32 even = (most + unit - 1) / unit * unit;
      if (total + even <= even * (blocks - blocks / 16)) continue;
      each = even, longer = 0;
      break;
    }
    start = start_of(blockIdx.x), end = start_of(blockIdx.x + 1);
  }
  __device__ __forceinline__ u32 start_of(u32 block) const {
    return min(block * each + min(block, longer), total);
  }
  // The block that chunk x falls to.
  __device__ __forceinline__ u32 owner(u32 x) const {
    if (each == 0) return x;
    const u32 block = x / (each + 1);
    return block < longer ? block : (x - longer) / each;
  }
};

// `r` stepped to the request of chunk `at`.
__device__ __forceinline__ void step_to(const Params& p, Share& s, Request& r, u32 at) {
  while (at >= s.request_at + r.work) {
    s.request_at += r.work;
    r = read_request(p, r.index + 1);
  }
}

// The chunk `at`: its item, `r` stepped to its request.
__device__ __forceinline__ Item find_item(const Params& p, Share& s, Request& r, u32 at) {
  step_to(p, s, r, at);
  const int place = quotient(int(at - s.request_at), r.chunks);
  const int row_tile = quotient(place, p.kv_heads);
  Item item;
  item.head = place - row_tile * p.kv_heads;
  item.row = row_tile * kRows;
  item.rows = min(r.rows - item.row, kRows);
  item.chunks = r.chunks;
  item.at = s.request_at + place * r.chunks;
  return item;
}
