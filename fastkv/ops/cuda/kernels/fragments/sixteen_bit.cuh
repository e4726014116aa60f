// SPDX-License-Identifier: Apache-2.0
// bf16 or fp16 in the cache: what is loaded is what is multiplied.
//
// A `Fragments` says how the bytes of a tile of K or V become the A operands of the products
// S^T = K Q^T and O^T = V^T P^T, and which element of D stands where in the other operand and in
// the result. `kBlocks` 16-token blocks make a tile.
#pragma once
#include "common/tensor_core.cuh"

template <class T, int D> struct SixteenBit {
  using Math = T;
  static constexpr int kBlocks = 1;
  static constexpr int kRowBytes = 2 * D;
  static constexpr bool kMayBeNotFinite = true;
  // One load of a tile gives kSteps steps of 16 along D (K), or kSteps blocks of 16 along D (V).
  static constexpr int kLoads = D / 16;
  static constexpr int kSteps = 1;
  static constexpr float kUnit = 1.f;  // see eight_bit.cuh
  static constexpr float kBias = 0.f;

  // The lane's row and byte column within the tile, of load 0; a load is 32 bytes wide.
  static constexpr int kLoadBytes = 32;
  static __device__ __forceinline__ int k_row(int lane) { return lane & 15; }
  static __device__ __forceinline__ int k_byte(int lane) { return lane & 16; }
  static __device__ __forceinline__ int v_row(int lane) { return (lane & 7) + (lane & 16) / 2; }
  static __device__ __forceinline__ int v_byte(int lane) { return (lane & 8) * 2; }

  static __device__ __forceinline__ void k(u32 (&a)[kSteps][kBlocks][4], const u32 (&r)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[0][0][i] = r[i];
  }
  static __device__ __forceinline__ void v(u32 (&a)[kSteps][kBlocks][4], const u32 (&r)[4]) {
    k(a, r);
  }

  // Element of D at place i (b0 low, b0 high, b1 low, b1 high) of Q's fragment in step `step`.
  static __device__ __forceinline__ int q_dim(int step, int t, int i) {
    return 16 * step + 2 * t + (i & 1) + (i & 2) * 4;
  }
  static __device__ __forceinline__ constexpr float q_unit(int) { return 1.f; }

  // Query row `i` of the lane's two, of O of one column of 8, to `to [D]`.
  static __device__ __forceinline__ void store(float* to, const float (&o)[D / 16][4], int g,
                                               int i) {
#pragma unroll
    for (int block = 0; block < D / 16; ++block) {
      to[16 * block + g] = o[block][i];
      to[16 * block + g + 8] = o[block][i + 2];
    }
  }

  // Whether four bytes hold an infinity or a NaN.
  static __device__ __forceinline__ bool not_finite(u32 x) {
    constexpr u32 exponent = T::kExponent;
    return (x & exponent) == exponent || (x >> 16 & exponent) == exponent;
  }
};
