// SPDX-License-Identifier: Apache-2.0
// Two signed nibbles a byte, element 2j low and 2j + 1 high, multiplied as fp16.
//
// A nibble s, its top bit flipped, is s + 8. In the low four bits of an fp16 it is a subnormal number,
// (s + 8) * 2^-24; in the four above, 16 times as much. One logic instruction a pair, no arithmetic:
// the tensor core takes subnormal numbers as they are.
// See eight_bit.cuh for which element stands where.
#pragma once
#include "common/tensor_core.cuh"

template <int D> struct FourBit {
  using Math = Fp16;
  static constexpr int kBlocks = 2;
  static constexpr int kRowBytes = D / 2;
  static constexpr bool kMayBeNotFinite = false;
  // A load is 16 bytes, 32 elements, of each of the tile's 32 tokens.
  static constexpr int kLoads = D / 32;
  static constexpr int kSteps = 2;

  static constexpr int kLoadBytes = 16;
  static __device__ __forceinline__ int k_row(int lane) { return lane; }
  static __device__ __forceinline__ int k_byte(int) { return 0; }
  static __device__ __forceinline__ int v_row(int lane) { return lane; }
  static __device__ __forceinline__ int v_byte(int) { return 0; }

  static constexpr float kUnit = 16777216.f;
  static constexpr float kBias = 8.f;

  // Nibbles 0 and 4 of x, or with kPlace 4 nibbles 1 and 5.
  template <int kPlace> static __device__ __forceinline__ u32 pair(u32 x) {
    u32 flip, y;
    // Opaque: one instruction with the constant in a register, where the compiler would make two.
    asm("mov.b32 %0, %1;" : "=r"(flip) : "n"(0x00080008u << kPlace));
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;"  // (x & mask) ^ flip
        : "=r"(y)
        : "r"(x), "n"(0x000f000fu << kPlace), "r"(flip));
    return y;
  }

  static __device__ __forceinline__ void k(u32 (&a)[kSteps][kBlocks][4], const u32 (&r)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 x = r[i], y = x >> 8;
      a[0][i / 2][i & 1] = pair<0>(x);
      a[0][i / 2][2 + (i & 1)] = pair<4>(x);
      a[1][i / 2][i & 1] = pair<0>(y);
      a[1][i / 2][2 + (i & 1)] = pair<4>(y);
    }
  }
  static __device__ __forceinline__ void v(u32 (&a)[kSteps][kBlocks][4], const u32 (&r)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 x = r[i], y = x >> 8;
      a[0][i / 2][2 * (i & 1)] = pair<0>(x);
      a[0][i / 2][2 * (i & 1) + 1] = pair<4>(x);
      a[1][i / 2][2 * (i & 1)] = pair<0>(y);
      a[1][i / 2][2 * (i & 1) + 1] = pair<4>(y);
    }
  }

  static __device__ __forceinline__ int q_dim(int step, int t, int i) {
    return 32 * (step / 2) + 8 * t + 2 * (step & 1) + (i & 1) * 4 + (i >> 1);
  }
  // What q is multiplied by at place i: there the nibbles are 16 times as large.
  static __device__ __forceinline__ constexpr float q_unit(int i) {
    return i < 2 ? 1.f : 0.0625f;
  }
  static __device__ __forceinline__ void store(float* to, const float (&o)[D / 16][4], int g,
                                               int i) {
#pragma unroll
    for (int block = 0; block < D / 16; block += 2) {
      const float(&x)[4] = o[block], (&y)[4] = o[block + 1];
      constexpr float kHigh = kUnit / 16.f;
      *reinterpret_cast<float4*>(to + 16 * block + 4 * g) = {x[i] * kUnit, x[i + 2] * kHigh,
                                                             y[i] * kUnit, y[i + 2] * kHigh};
    }
  }
  static __device__ __forceinline__ bool not_finite(u32) { return false; }
};
