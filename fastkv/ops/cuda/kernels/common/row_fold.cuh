// SPDX-License-Identifier: Apache-2.0
// A head's row of D elements over D / 16 lanes of a warp. Lane `part` holds two chunks of eight:
// elements 8 * part .. and D/2 + 8 * part .., so that a NeoX pair (i, i + D/2) and the first fold
// of a sum lie within a thread, and so does an interleaved pair (2i, 2i + 1).
#pragma once

#include "common/numbers.cuh"
#include "common/paging.cuh"
#include "common/rounding.cuh"

template <int kHeadDim> struct RowLayout {
  static_assert(kHeadDim % 16 == 0 && kHeadDim <= 512, "rows of 16 elements a lane in one warp");
  static constexpr int kLanes = kHeadDim / 16;       // of a row
  static constexpr int kRows = 32 / kLanes;          // of a warp; D 96 leaves two lanes idle
  static constexpr int kHalf = kHeadDim / 2;
  // Floats of shared memory of a row: 9 * kLanes spreads the fold's reads over the banks; a
  // multiple of 4 keeps 16-byte stores aligned.
  static constexpr int kFoldPitch = (9 * kLanes + 3) / 4 * 4;
};

struct Add {
  static __device__ __forceinline__ float of(float a, float b) { return __fadd_rn(a, b); }
};
struct MaxOrNan {
  static __device__ __forceinline__ float of(float a, float b) { return max_or_nan(a, b); }
};

// Folds one value of each of a row's lanes: halves while their number is even, then in order. All
// lanes of the row get the result; all lanes of the warp take part.
template <class Op, int kLanes> __device__ __forceinline__ float fold_lanes(float x, int row_lane) {
  int n = kLanes;
#pragma unroll
  for (; n % 2 == 0; n /= 2) {
    // Lane t < n/2 adds lane t + n/2; the others' sums are not used.
    x = Op::of(x, __shfl_sync(kAllLanes, x, threadIdx.x % 32 + n / 2));
  }
  float total = __shfl_sync(kAllLanes, x, row_lane);
#pragma unroll
  for (int i = 1; i < n; ++i) total = Op::of(total, __shfl_sync(kAllLanes, x, row_lane + i));
  return total;
}

// The sum of squares of a row, in the reference's order: fold halves while the count is even, then
// from the first to the last. `scratch`: kFoldPitch floats of this row.
template <int kHeadDim>
__device__ __forceinline__ float sum_of_squares(const float (&low)[8], const float (&high)[8],
                                                float* scratch, int part, int row_lane) {
  using Layout = RowLayout<kHeadDim>;
  float4 folded[2];
  float* s = reinterpret_cast<float*>(folded);
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // element i of the row with i + D/2
    s[i] = __fadd_rn(__fmul_rn(low[i], low[i]), __fmul_rn(high[i], high[i]));
  }
  __syncwarp();  // the row before this one was read
  reinterpret_cast<float4*>(scratch + 8 * part)[0] = folded[0];
  reinterpret_cast<float4*>(scratch + 8 * part)[1] = folded[1];
  __syncwarp();
  // D/2 values are left, 8 a lane. Lane t takes t, t + kLanes, ..: three more folds are its own.
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i] = scratch[part + i * Layout::kLanes];
#pragma unroll
  for (int n = 4; n > 0; n /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) s[i] = __fadd_rn(s[i], s[i + n]);
  }
  return fold_lanes<Add, Layout::kLanes>(s[0], row_lane);
}
