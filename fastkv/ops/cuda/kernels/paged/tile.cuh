// SPDX-License-Identifier: Apache-2.0
// What a warp does with one tile of keys: S^T = K Q^T, the softmax's step, O^T += V^T P^T.
//
// Keys stand along m and query rows along n, so that each key is converted to the product's number
// type once for all query rows. Lane 4g + t holds keys g, g + 8, ... and query rows 2t, 2t + 1 of
// each column of 8.
#pragma once
#include "paged/fold.cuh"
#include "paged/rows.cuh"
#include "paged/stream.cuh"

struct WarpState {
  float o[kColumns][kDimSteps][4];
  float m[kColumns][2];
  int exponent[kColumns];  // with a scale per token: of the largest that one of the 8 rows has seen
  float l[kColumns][4];  // two, by a product with ones; with a scale per token: this lane's keys only

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int d = 0; d < kDimSteps; ++d) o[c][d][i] = 0.f;
      }
      l[c][0] = l[c][1] = l[c][2] = l[c][3] = 0.f;
      m[c][0] = m[c][1] = MINUS_INFINITY;
      exponent[c] = 0;
    }
  }

  // O of column c by the factors of its two rows in this lane.
  __device__ __forceinline__ void scale_sums(int c, const float (&factor)[2]) {
#pragma unroll
    for (int d = 0; d < kDimSteps; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[c][d][i] *= factor[i & 1];
    }
  }

  // The exponent field of what weights are multiplied by, which O has as a factor.
  __device__ __forceinline__ int unit_field(int c) const {
    return min(127 + 14 + 127 - exponent[c], 254);
  }
  __device__ __forceinline__ float unit(int c) const {
    return __uint_as_float(u32(unit_field(c)) << 23);
  }

  // The row's state, complete in every lane.
  __device__ __forceinline__ RowState row(int c, int i) const {
    float sum = l[c][i];
    if constexpr (kPagedScales) {
#pragma unroll
      for (int k = 4; k < 32; k *= 2) sum += __shfl_xor_sync(~0u, sum, k);
    }
    return {m[c][i], sum, kPagedScales ? m[c][i] + float(127 - unit_field(c)) : 0.f};
  }
};

// Query fragments: in registers where they are few, else from shared memory at each use. And what
// turns this lane's two rows' products into scores, x = s * factor + shift.
struct Query {
  static constexpr bool kHeld = kColumns == 1 && kD <= 128;
  uint2 held[kHeld ? kDimSteps : 1];
  float2 factor[kColumns], shift[kColumns];
  const Shared& sh;

  __device__ __forceinline__ Query(const Shared& sh) : sh(sh) {
    if constexpr (kHeld) {
#pragma unroll
      for (int s = 0; s < kDimSteps; ++s) held[s] = sh.q[s][0][threadIdx.x % 32];
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) factor[c] = load(sh.factor, c), shift[c] = load(sh.shift, c);
  }
  static __device__ __forceinline__ float2 load(const float* rows, int c) {
    return *reinterpret_cast<const float2*>(rows + 8 * c + threadIdx.x % 4 * 2);
  }
  __device__ __forceinline__ uint2 at(int step, int column) const {
    if constexpr (kHeld) return held[step];
    return sh.q[step][column][threadIdx.x % 32];
  }
};

using Scores = float[F::kBlocks][kColumns][4];

__device__ __forceinline__ void multiply_keys(Scores& s, const Query& query, u32 k_tile) {
  const int lane = threadIdx.x % 32;
  const u32 from = fragment_address(k_tile, F::k_row(lane), F::k_byte(lane));
#pragma unroll
  for (int i = 0; i < F::kLoads; ++i) {
    u32 r[4], a[F::kSteps][F::kBlocks][4];
    load_matrices(r, along(from, i * F::kLoadBytes));
    F::k(a, r);
#pragma unroll
    for (int step = 0; step < F::kSteps; ++step) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const uint2 b = query.at(i * F::kSteps + step, c);
#pragma unroll
        for (int block = 0; block < F::kBlocks; ++block) {
          mma<Math>(s[block][c], a[step][block], b.x, b.y);
        }
      }
    }
  }
}

using Weights = u32[F::kBlocks][kColumns][2];

__device__ __forceinline__ void add_values(WarpState& w, const Weights& b, u32 v_tile) {
  const int lane = threadIdx.x % 32;
  const u32 from = fragment_address(v_tile, F::v_row(lane), F::v_byte(lane));
#pragma unroll
  for (int i = 0; i < F::kLoads; ++i) {
    u32 r[4], a[F::kSteps][F::kBlocks][4];
    load_matrices_transposed(r, along(from, i * F::kLoadBytes));
    F::v(a, r);
#pragma unroll
    for (int step = 0; step < F::kSteps; ++step) {
#pragma unroll
      for (int block = 0; block < F::kBlocks; ++block) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          mma<Math>(w.o[c][i * F::kSteps + step], a[step][block], b[block][c][0], b[block][c][1]);
        }
      }
    }
  }
}

// Some key of the tile is hidden from some row, and V is not finite somewhere: 0 * NaN is NaN, and
// must not reach a row that cannot see it. Row by row, with the keys that it cannot see zeroed.
__device__ __forceinline__ void add_values_by_row(WarpState& w, const Weights& b, u32 v_tile,
                                               const Shared& sh, int token) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const u32 from = fragment_address(v_tile, F::v_row(lane), F::v_byte(lane));
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll 1
    for (int row = 0; row < 8; ++row) {
      const int low = sh.low[8 * c + row], high = sh.high[8 * c + row];
#pragma unroll
      for (int i = 0; i < F::kLoads; ++i) {
        u32 r[4], a[F::kSteps][F::kBlocks][4];
        load_matrices_transposed(r, along(from, i * F::kLoadBytes));
        F::v(a, r);
#pragma unroll
        for (int step = 0; step < F::kSteps; ++step) {
          float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int block = 0; block < F::kBlocks; ++block) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int key = token + 16 * block + 8 * (j / 2) + 2 * t;
              if (key < low || key >= high) a[step][block][j] &= 0xffff0000u;
              if (key + 1 < low || key + 1 >= high) a[step][block][j] &= 0x0000ffffu;
            }
            mma<Math>(sum, a[step][block], g == row ? b[block][c][0] : 0,
                      g == row ? b[block][c][1] : 0);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (2 * t + (j & 1) == row) w.o[c][i * F::kSteps + step][j] += sum[j];
          }
        }
      }
    }
  }
}

__device__ __forceinline__ bool any_not_finite(u32 v_tile) {
  bool found = false;
  for (int i = threadIdx.x % 32; i < kTile * (F::kRowBytes / 4); i += 32) {
    const int row = i / (F::kRowBytes / 4), word = i % (F::kRowBytes / 4);
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(v_tile + row * kPitch + 4 * word));
    found = found || F::not_finite(x);
  }
  return __any_sync(~0u, found);
}

struct TileMask {
  bool clean;          // every row sees every key
  int token;           // first key of the tile
  bool there[F::kBlocks];  // 16 keys on a page
};

// Maximum over the tile's keys, in every lane, of query row `i` of column c.
__device__ __forceinline__ float over_keys(const Scores& s, int c, int i) {
  float top = MINUS_INFINITY;
#pragma unroll
  for (int block = 0; block < F::kBlocks; ++block) {
    top = fmaxf(top, fmaxf(s[block][c][i], s[block][c][i + 2]));
  }
#pragma unroll
  for (int k = 4; k < 32; k *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, k));
  return top;
}

// tanh(x) = 1 - 2 / (1 + e^2x), with x in units of the cap.
__device__ __forceinline__ void cap_scores(Scores& s, float cap) {
#pragma unroll
  for (int block = 0; block < F::kBlocks; ++block) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float grown = exp2_fast(__fmul_rn(2.f * kLog2e, s[block][c][i]));
        const float tanh = __fadd_rn(1.f, -__fdividef(2.f, __fadd_rn(1.f, grown)));
        s[block][c][i] = __fmul_rn(cap * kLog2e, tanh);
      }
    }
  }
}

__device__ __forceinline__ void hide_scores(Scores& s, const Shared& sh, const TileMask& mask) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = sh.low[8 * c + 2 * t + i], high = sh.high[8 * c + 2 * t + i];
#pragma unroll
      for (int j = 0; j < 2 * F::kBlocks; ++j) {
        const int key = mask.token + 8 * j + g;
        const bool seen = key >= low && key < high && mask.there[j / 2];
        float& x = s[j / 2][c][j % 2 * 2 + i];
        x = seen ? x : MINUS_INFINITY;
      }
    }
  }
}

// Scores in units of log 2, hidden keys at -inf. `k_scale` is of the lane's token, as token_scale.
__device__ __forceinline__ void finish_scores(Scores& s, const Params& p, const Shared& sh,
                                              const Query& query, const TileMask& mask,
                                              float k_scale) {
  const int g = threadIdx.x % 32 / 4;
  float per_key[2 * F::kBlocks];
#pragma unroll
  for (int j = 0; j < 2 * F::kBlocks; ++j) {
    per_key[j] = kPagedScales ? __shfl_sync(~0u, k_scale, 8 * j + g) : 1.f;
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const float2 factor = query.factor[c], shift = query.shift[c];
#pragma unroll
    for (int j = 0; j < 2 * F::kBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[j / 2][c][j % 2 * 2 + i];
        const float scale = i == 0 ? factor.x : factor.y;
        const float by = i == 0 ? shift.x : shift.y;
        x = kShifts ? __fmaf_rn(x, scale, by) : __fmul_rn(x, scale);
        if constexpr (kPagedScales) x = __fmul_rn(x, per_key[j]);
      }
    }
  }
  if (p.soft_cap != 0.f) cap_scores(s, p.soft_cap);
  if (!mask.clean) hide_scores(s, sh, mask);
}

// With a scale per token, a weight has its key's scale of V, and a power of two that brings the
// largest scale that a column's rows have seen to 2^14 ... 2^15: exact, and fp16 is widest there.
struct ValueScales {
  float of[2 * F::kBlocks];  // the lane's keys
  int exponent;              // of the tile's largest finite one

  __device__ __forceinline__ explicit ValueScales(float v_scale) {
    if constexpr (!kPagedScales) return;
    const u32 bits = __float_as_uint(v_scale);
    exponent = int(__reduce_max_sync(~0u, bits < 0x7f800000u ? bits : 0) >> 23);
#pragma unroll
    for (int i = 0; i < 2 * F::kBlocks; ++i) {
      of[i] = __shfl_sync(~0u, v_scale, 8 * i + threadIdx.x % 32 / 4);
    }
  }

  // The exponent for column c where not all of its rows see all of the tile's keys.
  __device__ __forceinline__ int over_seen(const Scores& s, int c) const {
    u32 most = 0;
#pragma unroll
    for (int j = 0; j < 2 * F::kBlocks; ++j) {
      const u32 bits = __float_as_uint(of[j]);
      const float(&x)[4] = s[j / 2][c];
      const bool seen = x[j % 2 * 2] != MINUS_INFINITY || x[j % 2 * 2 + 1] != MINUS_INFINITY;
      most = max(most, seen && bits < 0x7f800000u ? bits : 0);
    }
    return int(__reduce_max_sync(~0u, most) >> 23);
  }
};

// Brings l and O of column c from their maxima, and exponent, to the new ones.
__device__ __forceinline__ void grow(WarpState& w, int c, const float (&m)[2], int exponent) {
  float shrink[2];
  [[maybe_unused]] float unit = 1.f;
  if constexpr (kPagedScales) {
    const int before = w.unit_field(c);
    w.exponent[c] = exponent;
    const int field = max(127 + w.unit_field(c) - before, 0);  // 0: below 2^-126
    unit = __uint_as_float(u32(field) << 23);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    shrink[i] = weight(w.m[c][i], m[i]);
    w.m[c][i] = m[i];
    w.l[c][i] = __fmul_rn(w.l[c][i], shrink[i]);
    if constexpr (kPagedScales) shrink[i] = __fmul_rn(shrink[i], unit);
  }
  w.scale_sums(c, shrink);
}

// From scores to weights, the state brought to the new maximum.
__device__ __forceinline__ void soften(WarpState& w, Scores& s, Weights& b, float v_scale,
                                       bool clean) {
  float m[kColumns][2];
  int exponent[kColumns];
  bool grows = false;
  const ValueScales scales(v_scale);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      m[c][i] = fmaxf(w.m[c][i], over_keys(s, c, i));
      grows = grows || m[c][i] > w.m[c][i];
    }
    exponent[c] = 0;
    if constexpr (kPagedScales) {
      exponent[c] = max(clean ? scales.exponent : scales.over_seen(s, c), w.exponent[c]);
      grows = grows || exponent[c] > w.exponent[c];
    }
  }
  if (__any_sync(~0u, grows)) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) grow(w, c, m[c], exponent[c]);
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int j = 0; j < 2 * F::kBlocks; ++j) {
      // Of a key that no row sees the scale may be NaN.
      const float scale = kPagedScales ? __fmul_rn(w.unit(c), scales.of[j]) : 1.f;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[j / 2][c][j % 2 * 2 + i];
        const bool hidden = kPagedScales && !clean && x == MINUS_INFINITY;
        x = exp2_fast(__fadd_rn(x, w.m[c][i] == MINUS_INFINITY ? 0.f : -w.m[c][i]));
        if constexpr (kPagedScales) {
          w.l[c][i] = __fadd_rn(w.l[c][i], x);
          x = hidden ? 0.f : __fmul_rn(x, scale);
        }
      }
    }
#pragma unroll
    for (int block = 0; block < F::kBlocks; ++block) {
      b[block][c][0] = transpose_matrix(pack2<Math>(s[block][c][0], s[block][c][1]));
      b[block][c][1] = transpose_matrix(pack2<Math>(s[block][c][2], s[block][c][3]));
      if constexpr (!kPagedScales) {
        // Sums of the rounded weights, which are what multiplies V.
        const u32 ones = pack2<Math>(1.f, 1.f);
        const u32 a[4] = {ones, ones, ones, ones};
        mma<Math>(w.l[c], a, b[block][c][0], b[block][c][1]);
      }
    }
  }
}

__device__ __forceinline__ void attend_tile(WarpState& w, const Params& p, const Shared& sh,
                                            const Query& query, const Stream& stream,
                                            const Bounds& see, int tile) {
  float k_scale = 0.f, v_scale = 0.f;
  if constexpr (kPagedScales) stream.load_scales(tile, k_scale, v_scale);
  TileMask mask;
  mask.token = stream.token(tile);
  mask.clean = mask.token >= see.clean_low && mask.token + kTile <= see.clean_high;
#pragma unroll
  for (int i = 0; i < F::kBlocks; ++i) {
    mask.there[i] = stream.page(tile, i) >= 0;
    mask.clean = mask.clean && mask.there[i];
  }
  const u32 k_tile = stream.stage(tile), v_tile = k_tile + kTileBytes;
  Scores scores = {};
  multiply_keys(scores, query, k_tile);
  finish_scores(scores, p, sh, query, mask, k_scale);
  Weights weights;
  soften(w, scores, weights, v_scale, mask.clean);
  if (F::kMayBeNotFinite && !mask.clean && any_not_finite(v_tile)) {
    add_values_by_row(w, weights, v_tile, sh, mask.token);
  } else {
    add_values(w, weights, v_tile);
  }
}
