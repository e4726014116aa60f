// SPDX-License-Identifier: Apache-2.0
// Merge attention over two disjoint sets of keys.
//
// Grid: blocks of kThreads * kUnroll chunks of eight elements, over all T * Hq * D / 8. Block:
// kThreads threads. No shared memory. Neighbouring threads take neighbouring chunks.
//
// Shapes: out_a, out_b, out [T, Hq, D], lse_a, lse_b, lse [T, Hq]; the results are contiguous.
//
// Invariants: an empty state (lse = -inf) has no part in the result, whatever its `out` holds; two
// empty states give 0 and -inf.
#include "common/grid.cuh"
#include "common/rounding.cuh"
#include "common/vectors.cuh"

using T = FASTKV_OUT;

constexpr int kHeadDim = FASTKV_HEAD_DIM;
constexpr int kChunks = kHeadDim / 8;  // of a head
static_assert(kHeadDim % 8 == 0, "chunks of eight elements");
constexpr int kThreads = FASTKV_THREADS;
constexpr int kUnroll = FASTKV_UNROLL;

struct Params {
  const T* out_a;
  const float* lse_a;
  const T* out_b;
  const float* lse_b;
  T* out;
  float* lse;
  // Constant for the metadata; strides in elements.
  i64 out_a_row, out_a_head, out_b_row, out_b_head;
  i64 lse_a_row, lse_a_head, lse_b_row, lse_b_head;
  i64 chunks;
  i32 heads, unused;
};
static_assert(sizeof(Params) == FASTKV_PARAMS_BYTES, "the launcher packs this struct");

struct Weights {
  float a, b, total, top;
};

__device__ __forceinline__ bool is_empty(float lse) { return __float_as_uint(lse) == 0xff800000u; }

__device__ __forceinline__ Weights weights(float lse_a, float lse_b) {
  float top = max_or_nan(lse_a, lse_b);
  if (is_empty(top)) top = 0.0f;
  const float a = expf(lse_a - top), b = expf(lse_b - top);
  return {a, b, a + b, top};
}

__device__ __forceinline__ void merge(const float (&a)[8], const float (&b)[8], const Weights& w,
                                      bool is_a_empty, bool is_b_empty, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    // Not 0 * a: an empty state may hold NaN.
    const float from_a = is_a_empty ? 0.0f : __fmul_rn(a[i], w.a);
    const float from_b = is_b_empty ? 0.0f : __fmul_rn(b[i], w.b);
    x[i] = w.total == 0.0f ? 0.0f : __fdiv_rn(__fadd_rn(from_a, from_b), w.total);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    merge_states(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const i64 first = i64(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  u32 raw_a[kUnroll][kWordsOf8<T>], raw_b[kUnroll][kWordsOf8<T>];
  float lse_a[kUnroll], lse_b[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const i64 i = first + u * kThreads;
    if (i >= p.chunks) break;
    const u32 state = u32(i / kChunks), element = u32(i % kChunks) * 8;
    const u32 row = state / u32(p.heads), head = state % u32(p.heads);
    load_words_once(p.out_a + row * p.out_a_row + head * p.out_a_head + element, raw_a[u]);
    load_words_once(p.out_b + row * p.out_b_row + head * p.out_b_head + element, raw_b[u]);
    lse_a[u] = p.lse_a[row * p.lse_a_row + head * p.lse_a_head];
    lse_b[u] = p.lse_b[row * p.lse_b_row + head * p.lse_b_head];
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const i64 i = first + u * kThreads;
    if (i >= p.chunks) break;
    const Weights w = weights(lse_a[u], lse_b[u]);
    float a[8], b[8], x[8];
    unpack8<T>(raw_a[u], a);
    unpack8<T>(raw_b[u], b);
    merge(a, b, w, is_empty(lse_a[u]), is_empty(lse_b[u]), x);
    store8(p.out + i * 8, x);
    if (i % kChunks == 0) p.lse[i / kChunks] = w.top + logf(w.total);
  }
}
