// SPDX-License-Identifier: Apache-2.0
// Two signed nibbles a byte, element 2j low and 2j + 1 high, multiplied as fp16.
//
// A nibble s, its top bit flipped, is s + 8; under the exponent of 1024 it is 1024 + 8 + s, and in
// the second place of a byte 1024 + 16 (s + 8). One logic and one arithmetic instruction a pair.
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

  // Nibbles 0 and 4 of x, signed.
  static __device__ __forceinline__ u32 first(u32 x) {
    u32 y;
    x = (x & 0x000f000fu) ^ 0x64086408u;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(0x64086408u));
    return y;
  }
  // Nibbles 1 and 5: (1024 + 16 (s + 8)) / 16 - 72.
  static __device__ __forceinline__ u32 second(u32 x) {
    u32 y;
    x = (x & 0x00f000f0u) ^ 0x64806480u;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(0x2c002c00u), "r"(0xd480d480u));
    return y;
  }

  static __device__ __forceinline__ void k(u32 (&a)[kSteps][kBlocks][4], const u32 (&r)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 x = r[i], y = x >> 8;
      a[0][i / 2][i & 1] = first(x);
      a[0][i / 2][2 + (i & 1)] = second(x);
      a[1][i / 2][i & 1] = first(y);
      a[1][i / 2][2 + (i & 1)] = second(y);
    }
  }
  static __device__ __forceinline__ void v(u32 (&a)[kSteps][kBlocks][4], const u32 (&r)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 x = r[i], y = x >> 8;
      a[0][i / 2][2 * (i & 1)] = first(x);
      a[0][i / 2][2 * (i & 1) + 1] = second(x);
      a[1][i / 2][2 * (i & 1)] = first(y);
      a[1][i / 2][2 * (i & 1) + 1] = second(y);
    }
  }

  static __device__ __forceinline__ int q_dim(int step, int t, int i) {
    return 32 * (step / 2) + 8 * t + 2 * (step & 1) + (i & 1) * 4 + (i >> 1);
  }
  static __device__ __forceinline__ int out_dim(int block, int g, int half) {
    return 32 * (block / 2) + 4 * g + 2 * (block & 1) + half;
  }
  static __device__ __forceinline__ bool not_finite(u32) { return false; }
};
