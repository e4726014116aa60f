// SPDX-License-Identifier: Apache-2.0
// The softmax of the two rows, g and g + 8 of 16, that a lane holds of a product: lane 4g + t has
// columns 8j + 2t and 8j + 2t + 1 of tile j, x[j][0..1] of row g and x[j][2..3] of row g + 8.
#pragma once
#include "masked/work.cuh"

// Maximum of the scores (base 2), the lane's part of the sum of 2^(s - m), and the keys seen.
struct Rows {
  float m[2], l[2];
  int low[2], high[2];

  Rows() = default;
  // Rows `first` and `first` + 8 of a tile; nothing is seen by what is no row.
  __device__ __forceinline__ Rows(const Params& p, const Work& w, int first) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      m[i] = MINUS_INFINITY, l[i] = 0.f, low[i] = high[i] = 0;
      const int row = first + 8 * i;
      if (row >= w.rows) continue;
      const int2 keys = keys_of(p, w.request, w.row + row);
      low[i] = keys.x, high[i] = keys.y;
    }
  }
};

// What turns products into scores in units of log 2, which is positive: for a negative one the
// products' sign changes.
struct Units {
  float factor, cap;
  bool negative;

  __device__ __forceinline__ explicit Units(const Params& p)
      : factor(fmaxf(fabsf(p.scale) * kLog2e, 1.2e-38f)), cap(p.soft_cap * kLog2e),
        negative(p.scale < 0.f) {}
};

// cap tanh(s / cap) = cap (1 - 2 / (1 + e^(2 s / cap))).
template <int kTiles>
__device__ __forceinline__ void cap_scores(float (&s)[kTiles][4], const Units& units) {
  const float grow = units.factor * (2.f / units.cap) * kLog2e;
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    float& x = s[i / 4][i % 4];
    const float grown = exp2_fast(__fmul_rn(x, grow));
    x = __fmul_rn(units.cap, __fadd_rn(1.f, -__fdividef(2.f, __fadd_rn(1.f, grown))));
  }
}

// Of the columns 8j and 8j + 1 in order, how many are below x.
template <int kTiles> __device__ __forceinline__ int columns_below(int x) {
  return min(max((x >> 3) * 2 + min(x & 7, 2), 0), 2 * kTiles);
}

// Scores of keys that a row does not see to -inf; `from` is the lane's first key. What a row sees is
// a run of the lane's columns: a word of bits, so that a score takes one test of a constant bit.
template <int kTiles>
__device__ __forceinline__ void hide_keys(float (&s)[kTiles][4], const Rows& r, int from) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int begin = columns_below<kTiles>(r.low[row] - from);
    const int end = columns_below<kTiles>(r.high[row] - from);
    const u32 seen = u32((u64(1) << end) - 1) & ~u32((u64(1) << begin) - 1);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[j][2 * row + i];
        x = seen >> (2 * j + i) & 1 ? x : MINUS_INFINITY;
      }
    }
  }
}

// From products to weights, rounded later, for the keys from `from` on; what scales the sums so far
// is left in `shrink`. Returns whether it is 1 for the whole warp.
template <int kTiles>
__device__ __forceinline__ bool soften(float (&s)[kTiles][4], Rows& r, float (&shrink)[2],
                                       const Units& units, int from, bool clean) {
  if (units.negative) {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) s[i / 4][i % 4] = -s[i / 4][i % 4];
  }
  float factor = units.factor;
  if (units.cap != 0.f) cap_scores(s, units), factor = 1.f;
  if (!clean) hide_keys(s, r, from + threadIdx.x % 4 * 2);
  bool same = true;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float top = MINUS_INFINITY;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) top = fmaxf(top, fmaxf(s[j][2 * row], s[j][2 * row + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float m = fmaxf(r.m[row], __fmul_rn(top, factor));
    same = same && m == r.m[row];
    shrink[row] = r.m[row] == MINUS_INFINITY ? 0.f : exp2_fast(__fadd_rn(r.m[row], -m));
    r.m[row] = m;
    const float base = m == MINUS_INFINITY ? 0.f : m;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[j][2 * row + i];
        x = exp2_fast(__fmaf_rn(x, factor, -base));
        sum = __fadd_rn(sum, x);
      }
    }
    r.l[row] = __fmaf_rn(r.l[row], shrink[row], sum);
  }
  return __all_sync(~0u, same);
}

template <int kTiles>
__device__ __forceinline__ void scale_rows(float (&o)[kTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) o[i / 4][i % 4] = __fmul_rn(o[i / 4][i % 4], factor[i / 2 % 2]);
}

// Finished rows to the output: 0, and -inf as lse, where no key was seen. A sink counts in the
// denominator alone.
__device__ __forceinline__ void write_rows(const Params& p, const Work& w, const Rows& r,
                                           const float (&o)[kOutTiles][4], int first) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float l = r.l[i];
    l = __fadd_rn(l, __shfl_xor_sync(~0u, l, 1));
    l = __fadd_rn(l, __shfl_xor_sync(~0u, l, 2));
    const int row = first + 8 * i;
    if (row >= w.rows) continue;
    const bool empty = l == 0.f;  // NaN is not
    const float lse2 = r.m[i] + log2_fast(l);
    float share = empty ? 0.f : reciprocal(l);
    if (p.sinks != nullptr) {
      share *= reciprocal(__fadd_rn(1.f, exp2_fast(p.sinks[w.head] * kLog2e - lse2)));
    }
    const i64 token = w.request.first + w.row + row;
    FASTKV_Q* out = p.out + token * p.out_token + w.head * p.out_head + 2 * t;
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
      const u32 pair = pack2<Math>(o[j][2 * i] * share, o[j][2 * i + 1] * share);
      *reinterpret_cast<u32*>(out + 8 * j) = empty ? 0u : pair;
    }
    if (p.lse != nullptr && t == 0) {
      p.lse[token * (p.kv_heads * p.group) + w.head] = empty ? MINUS_INFINITY : lse2 * kLn2;
    }
  }
}
