// SPDX-License-Identifier: Apache-2.0
// Eight e4m3 bytes and their float32 values (needs sm_89).
#pragma once

#include "common/numbers.cuh"

// Saturates at 448; NaN is 0x7f.
__device__ __forceinline__ void to_e4m3(const float (&x)[8], u32 (&stored)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 low = e4m3_pair(x[4 * i], x[4 * i + 1]);
    const u32 high = e4m3_pair(x[4 * i + 2], x[4 * i + 3]);
    stored[i] = low | (high << 16);
  }
}

__device__ __forceinline__ void from_e4m3(const u32 (&stored)[2], float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // through fp16, which holds every e4m3 value
    const u32 pair = e4m3_pair_to_fp16(u16(stored[i / 2] >> (16 * (i % 2))));
    x[2 * i] = low_float(pair, Fp16{});
    x[2 * i + 1] = high_float(pair, Fp16{});
  }
}
