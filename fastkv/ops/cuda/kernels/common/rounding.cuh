// SPDX-License-Identifier: Apache-2.0
// Single instructions that C++ has no operator for.
#pragma once

#include "common/numbers.cuh"

// To the nearest integer, ties to even; saturates, and NaN is 0.
__device__ __forceinline__ i32 round_to_int(float x) {
  i32 y;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Four integers to signed bytes, `a` the lowest, saturated to -128 .. 127.
__device__ __forceinline__ u32 to_bytes(i32 a, i32 b, i32 c, i32 d) {
  u32 high, y;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(high) : "r"(d), "r"(c));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(b), "r"(a), "r"(high));
  return y;
}

// NaN wins.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ float min_or_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
