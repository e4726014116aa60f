// SPDX-License-Identifier: Apache-2.0
// q = clamp(rne(x * quant), -127, 127), NaN to 0; x = q * dequant.
#pragma once

#include "common/multipliers.cuh"
#include "fragments/eight_bit.cuh"
#include "common/rounding.cuh"

struct Codec {
  template <int D> using Fragments = EightBit<Int8Expand, D>;
  static constexpr int kBits = 8;
  static constexpr Scales kScales = Scales::kStatic;
  static constexpr bool kZeroPoint = false;

  static __device__ __forceinline__ void encode(const float (&x)[8], const Multipliers& m,
                                                u32 (&stored)[2]) {
    i32 q[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      q[i] = max(round_to_int(__fmul_rn(x[i], m.scale[i])), -127);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // saturates at 127
      stored[i] = to_bytes(q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]);
    }
  }

  static __device__ __forceinline__ void decode(const u32 (&stored)[2], const Multipliers& m,
                                                float (&x)[8]) {
    // q + 128 as the low byte of 2^23's mantissa: one permutation and one exact subtraction.
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u32 shifted = stored[i / 4] ^ 0x80808080u;
      const float biased = __uint_as_float(__byte_perm(shifted, 0x4b000000u, 0x7540u | (i % 4)));
      x[i] = __fmul_rn(__fsub_rn(biased, 8388608.0f + 128.0f), m.scale[i]);
    }
  }
};
