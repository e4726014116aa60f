// SPDX-License-Identifier: Apache-2.0
// One scale a token and KV head, s = amax / 448 rounded to its dtype; q = e4m3(clamp(x / s, -448,
// 448)); x = q * s. A row of zeros has s = 0 and bytes 0; a NaN makes its row's s NaN.
#pragma once

#include "common/e4m3.cuh"
#include "common/multipliers.cuh"

template <class T> struct Limits;
template <> struct Limits<float> {
  static constexpr u32 kSmallestNormal = 0x00800000u, kLargest = 0x7f7fffffu;
};
template <> struct Limits<Bf16> {
  static constexpr u32 kSmallestNormal = 0x00800000u, kLargest = 0x7f7f0000u;
};
template <> struct Limits<Fp16> {
  static constexpr u32 kSmallestNormal = 0x38800000u, kLargest = 0x477fe000u;
};

struct Codec {
  static constexpr int kBits = 8;
  static constexpr Scales kScales = Scales::kPaged;
  static constexpr bool kZeroPoint = false;

  // The multiplier that a row with this amax stores, as its dtype T holds it.
  template <class T> static __device__ __forceinline__ float row_scale(float amax) {
    float s = __fdiv_rn(amax, 448.0f);
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(s) : "f"(__uint_as_float(Limits<T>::kSmallestNormal)));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(s) : "f"(__uint_as_float(Limits<T>::kLargest)));
    return __float_as_uint(amax) == 0 ? 0.0f : to_float(from_float<T>(s));
  }

  static __device__ __forceinline__ void encode(const float (&x)[8], const Multipliers& m,
                                                u32 (&stored)[2]) {
    float scaled[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) scaled[i] = __fdiv_rn(x[i], m.scale[i]);
    to_e4m3(scaled, stored);
    if (m.scale[0] == 0.0f) stored[0] = stored[1] = 0;
  }

  static __device__ __forceinline__ void decode(const u32 (&stored)[2], const Multipliers& m,
                                                float (&x)[8]) {
    from_e4m3(stored, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], m.scale[i]);
  }
};
