// SPDX-License-Identifier: Apache-2.0
// q = clamp(rne(x * quant + zp), -8, 7), NaN to clamp(rne(zp)); x = (q - zp) * dequant. Byte j holds
// element 2j in the low nibble and 2j + 1 in the high one, two's complement.
#pragma once

#include "common/multipliers.cuh"

struct Codec {
  static constexpr int kBits = 4;
  static constexpr Scales kScales = Scales::kStatic;
  static constexpr bool kZeroPoint = true;

  static __device__ __forceinline__ void encode(const float (&x)[8], const Multipliers& m,
                                                u32 (&stored)[1]) {
    stored[0] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float scaled = __fmul_rn(x[i], m.scale[i]);
      const float shifted = isnan(scaled) ? m.zp[i] : __fadd_rn(scaled, m.zp[i]);
      i32 q;
      asm("cvt.rni.s32.f32 %0, %1;" : "=r"(q) : "f"(shifted));
      q = min(max(q, -8), 7);
      stored[0] |= (u32(q) & 15u) << (4 * i);
    }
  }

  static __device__ __forceinline__ void decode(const u32 (&stored)[1], const Multipliers& m,
                                                float (&x)[8]) {
    // q + 8 as the low bits of 2^23's mantissa, and one exact subtraction.
    const u32 shifted = stored[0] ^ 0x88888888u;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float biased = __uint_as_float(((shifted >> (4 * i)) & 15u) | 0x4b000000u);
      const float q = __fsub_rn(biased, 8388608.0f + 8.0f);
      x[i] = __fmul_rn(__fsub_rn(q, m.zp[i]), m.scale[i]);
    }
  }
};
