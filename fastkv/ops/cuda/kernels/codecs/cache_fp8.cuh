// SPDX-License-Identifier: Apache-2.0
// q = e4m3(clamp(x * quant, -448, 448)), NaN stays; x = q * dequant.
#pragma once

#include "common/e4m3.cuh"
#include "common/multipliers.cuh"

struct Codec {
  static constexpr int kBits = 8;
  static constexpr Scales kScales = Scales::kStatic;
  static constexpr bool kZeroPoint = false;

  static __device__ __forceinline__ void encode(const float (&x)[8], const Multipliers& m,
                                                u32 (&stored)[2]) {
    float scaled[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) scaled[i] = __fmul_rn(x[i], m.scale[i]);
    to_e4m3(scaled, stored);
  }

  static __device__ __forceinline__ void decode(const u32 (&stored)[2], const Multipliers& m,
                                                float (&x)[8]) {
    from_e4m3(stored, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], m.scale[i]);
  }
};
