// SPDX-License-Identifier: Apache-2.0
// e4m3 or int8 in the cache, multiplied as fp16, in which both are exact.
//
// A code c stands in a product as (c + kBias) / kUnit; `load_query` and `write_output` take the bias
// for a part of the zero point, and scores and O are multiplied by the unit.
//
// ldmatrix moves bytes in pairs, so a lane gets four neighbouring elements of D of one token (K), or
// two of each of two tokens (V, transposed). Which element of D stands where in a product is free,
// as long as the other operand, or the result, knows: `q_dim` and `store`.
#pragma once
#include "common/tensor_core.cuh"

// Four bytes to two fp16 pairs: (0, 1) and (2, 3).
struct E4m3Expand {
  static constexpr bool kMayBeNotFinite = true;
  static constexpr float kUnit = 1.f;
  static constexpr float kBias = 0.f;
  static __device__ __forceinline__ void neighbours(u32& low, u32& high, u32 x) {
    low = e4m3_pair_to_fp16(u16(x));
    high = e4m3_pair_to_fp16(u16(x >> 16));
  }
  // (0, 2) and (1, 3): the tokens of an element.
  static __device__ __forceinline__ void alternate(u32& even, u32& odd, u32 x) {
    neighbours(even, odd, __byte_perm(x, 0, 0x3120));
  }
  static __device__ __forceinline__ bool not_finite(u32 x) {
    // A byte of 0x7f or 0xff is NaN; e4m3 has no infinity.
    const u32 y = ~(x | 0x80808080u);
    return ((y - 0x01010101u) & ~y & 0x80808080u) != 0;
  }
};

// int8 + 128 as the low byte of an fp16, a subnormal number: (x + 128) * 2^-24, exact, and no
// arithmetic. The tensor core takes subnormal numbers as they are.
struct Int8Expand {
  static constexpr bool kMayBeNotFinite = false;
  static constexpr float kUnit = 16777216.f;
  static constexpr float kBias = 128.f;
  static __device__ __forceinline__ void neighbours(u32& low, u32& high, u32 x) {
    x ^= 0x80808080u;
    low = __byte_perm(x, 0, 0x4140);
    high = __byte_perm(x, 0, 0x4342);
  }
  static __device__ __forceinline__ void alternate(u32& even, u32& odd, u32 x) {
    x ^= 0x80808080u;
    even = __byte_perm(x, 0, 0x4240);
    odd = __byte_perm(x, 0, 0x4341);
  }
  static __device__ __forceinline__ bool not_finite(u32) { return false; }
};

template <class Expand, int D> struct EightBit {
  using Math = Fp16;
  static constexpr int kBlocks = 2;
  static constexpr int kRowBytes = D;
  static constexpr bool kMayBeNotFinite = Expand::kMayBeNotFinite;
  static constexpr int kLoads = D / 16;
  static constexpr int kSteps = 1;
  static constexpr float kUnit = Expand::kUnit;
  static constexpr float kBias = Expand::kBias;

  // A load is 16 bytes of each of the tile's 32 tokens.
  static constexpr int kLoadBytes = 16;
  static __device__ __forceinline__ int k_row(int lane) { return lane; }
  static __device__ __forceinline__ int k_byte(int) { return 0; }
  static __device__ __forceinline__ int v_row(int lane) { return lane; }
  static __device__ __forceinline__ int v_byte(int) { return 0; }

  static __device__ __forceinline__ void k(u32 (&a)[kSteps][kBlocks][4], const u32 (&r)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Expand::neighbours(a[0][i / 2][i & 1], a[0][i / 2][2 + (i & 1)], r[i]);
    }
  }
  static __device__ __forceinline__ void v(u32 (&a)[kSteps][kBlocks][4], const u32 (&r)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Expand::alternate(a[0][i / 2][2 * (i & 1)], a[0][i / 2][2 * (i & 1) + 1], r[i]);
    }
  }

  static __device__ __forceinline__ int q_dim(int step, int t, int i) {
    return 16 * step + 4 * t + i;
  }
  static __device__ __forceinline__ constexpr float q_unit(int) { return 1.f; }
  static __device__ __forceinline__ void store(float* to, const float (&o)[D / 16][4], int g,
                                               int i) {
#pragma unroll
    for (int block = 0; block < D / 16; ++block) {
      *reinterpret_cast<float2*>(to + 16 * block + 2 * g) = {o[block][i] * kUnit, o[block][i + 2] * kUnit};
    }
  }
  static __device__ __forceinline__ bool not_finite(u32 x) { return Expand::not_finite(x); }
};
