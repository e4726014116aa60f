// SPDX-License-Identifier: Apache-2.0
// Number types and their conversions, in PTX: no CUDA header is needed, so none is parsed at
// compile time and none must be found.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

// kExponent: the bits that are all set in an infinity and a NaN.
struct Bf16 {
  static constexpr u32 kExponent = 0x7f80;
  u16 bits;
};
struct Fp16 {
  static constexpr u32 kExponent = 0x7c00;
  u16 bits;
};
struct E4m3 { u8 bits; };

__device__ __forceinline__ float bits_to_float(u32 x) { return __uint_as_float(x); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float to_float(Fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Round to nearest even; NaN stays NaN.
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ Bf16 from_float<Bf16>(float x) {
  Bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <> __device__ __forceinline__ Fp16 from_float<Fp16>(float x) {
  Fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two floats to one register, `low` in the low half.
template <class T> __device__ __forceinline__ u32 pack2(float low, float high);
template <> __device__ __forceinline__ u32 pack2<Bf16>(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <> __device__ __forceinline__ u32 pack2<Fp16>(float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Four neighbours to memory aligned for them.
template <class T> __device__ __forceinline__ void store4(T* to, const float (&x)[4]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]));
}
template <> __device__ __forceinline__ void store4<float>(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ float low_float(u32 pair, Bf16) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(u32 pair, Bf16) {
  return __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ float low_float(u32 pair, Fp16) {
  return to_float(Fp16{u16(pair & 0xffffu)});
}
__device__ __forceinline__ float high_float(u32 pair, Fp16) { return to_float(Fp16{u16(pair >> 16)}); }

// e4m3 pairs (needs sm_89). The conversion to e4m3 saturates at 448 and turns NaN into 0x7f.
__device__ __forceinline__ u16 e4m3_pair(float low, float high) {
  u16 y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ u32 e4m3_pair_to_fp16(u16 pair) {
  u32 y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(pair));
  return y;
}
