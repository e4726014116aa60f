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

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ int chunk_tokens(int length, int heads) {
  const int even = ceil_div(int((i64(length) * heads + kSplit - 1) / kSplit), 128) * 128;
  return max(kLeastChunk, even);
}

__device__ __forceinline__ Request read_request(const Params& p, int b) {
  Request r;
  r.index = b;
  const int limit = p.M << p.page_shift;
  r.first = min(max(p.cu_seqlens_q[b], 0), p.T);
  const int tokens = min(max(p.cu_seqlens_q[b + 1], r.first), p.T) - r.first;
  const int cached = p.cache_seqlens[b];
  r.cached = min(max(cached, 0), limit);
  r.length = min(r.cached + tokens, limit);
  r.rows = tokens * p.G;
  r.chunk = chunk_tokens(r.length, p.Hkv);
  r.chunk_first = max(r.cached - p.window + 1, 0) / r.chunk;
  r.chunks = max(1, ceil_div(r.length, r.chunk) - r.chunk_first);
  r.work = u32(ceil_div(r.rows, kRows)) * p.Hkv * r.chunks;
  if (p.faults != nullptr && (cached < 0 || i64(cached) + tokens > limit)) {
    report_fault(p.faults, kFaultLengths, b);
  }
  return r;
}

// Sum over the block, for every thread.
__device__ __forceinline__ u32 block_sum(u32 x, u32* scratch) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  u32 sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += scratch[w];
  __syncthreads();
  return sum;
}

// Inclusive prefix sum over the block's threads.
__device__ __forceinline__ u32 block_scan(u32 x, u32* scratch) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const u32 y = __shfl_up_sync(~0u, x, i);
    if (lane >= i) x += y;
  }
  if (lane == 31) scratch[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < int(threadIdx.x / 32)) x += scratch[w];
  }
  __syncthreads();
  return x;
}

struct Share {
  u32 total;   // chunks of the whole launch
  u32 blocks;  // that have work
  u32 start, end;
  int request;     // where the share begins
  u32 request_at;  // the first chunk of that request

  __device__ __forceinline__ u32 start_of(u32 block) const {
    return u32(u64(total) * block / blocks);
  }
  // The block that chunk x falls to.
  __device__ __forceinline__ u32 owner(u32 x) const {
    return u32(((u64(x) + 1) * blocks - 1) / total);
  }
};

__device__ __forceinline__ Share find_share(const Params& p, u32* scratch) {
  u32 work = 0;
  for (int b = threadIdx.x; b < p.B; b += kThreads) work += read_request(p, b).work;
  Share s;
  s.total = block_sum(work, scratch);
  s.blocks = min(gridDim.x, s.total);
  s.start = s.end = 0;
  s.request = 0, s.request_at = 0;
  if (blockIdx.x >= s.blocks) return s;
  s.start = s.start_of(blockIdx.x);
  s.end = s.start_of(blockIdx.x + 1);
  if (s.start == 0) return s;  // an empty request before the first one is stepped over later
  u32 before = 0;
  for (int base = 0; base < p.B; base += kThreads) {
    const int b = base + threadIdx.x;
    const u32 mine = b < p.B ? read_request(p, b).work : 0;
    const u32 until = before + block_scan(mine, scratch);
    if (until > s.start && until - mine <= s.start) {
      scratch[kWarps] = u32(b);
      scratch[kWarps + 1] = until - mine;
    }
    if (threadIdx.x == kThreads - 1) scratch[kWarps + 2] = until;
    if (__syncthreads_or(until > s.start)) break;
    before = scratch[kWarps + 2];
    __syncthreads();
  }
  s.request = int(scratch[kWarps]);
  s.request_at = scratch[kWarps + 1];
  __syncthreads();
  return s;
}
