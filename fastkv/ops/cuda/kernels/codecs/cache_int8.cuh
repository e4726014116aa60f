// SPDX-License-Identifier: Apache-2.0
// q = clamp(rne(x * quant), -127, 127), NaN to 0; x = q * dequant.
#pragma once

#include "common/multipliers.cuh"

struct Codec {
  static constexpr int kBits = 8;
  static constexpr Scales kScales = Scales::kStatic;
  static constexpr bool kZeroPoint = false;

  static __device__ __forceinline__ void encode(const float (&x)[8], const Multipliers& m,
                                                u32 (&stored)[2]) {
    i32 q[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // The conversion saturates, and turns NaN into 0.
      asm("cvt.rni.s32.f32 %0, %1;" : "=r"(q[i]) : "f"(__fmul_rn(x[i], m.scale[i])));
      q[i] = max(q[i], -127);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // packs with saturation at 127
      asm("{\n.reg .b32 high;\n"
          "cvt.pack.sat.s8.s32.b32 high, %4, %3, 0;\n"
          "cvt.pack.sat.s8.s32.b32 %0, %2, %1, high;\n}"
          : "=r"(stored[i])
          : "r"(q[4 * i]), "r"(q[4 * i + 1]), "r"(q[4 * i + 2]), "r"(q[4 * i + 3]));
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
