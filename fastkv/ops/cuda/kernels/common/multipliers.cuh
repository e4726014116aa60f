// SPDX-License-Identifier: Apache-2.0
// What a codec multiplies, divides or shifts eight neighbouring elements by, as float32.
#pragma once

#include "common/vectors.cuh"

// Where a format's multipliers come from: `ScaleKind` of its row.
enum class Scales { kNone, kStatic, kPaged };

// scale: a static format's quant (encode) or dequant (decode) multipliers; a dynamic format's row
// scale, eight times. zp: zero points, where the format has them.
struct Multipliers {
  float scale[8];
  float zp[8];
};

__device__ __forceinline__ Multipliers same_multiplier(float scale) {
  Multipliers m;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    m.scale[i] = scale;
    m.zp[i] = 0.0f;
  }
  return m;
}

// Of elements `element .. element + 7` of a KV head. T: dtype of the arrays, [Hkv] or [Hkv, D];
// `zp` is always per channel.
template <class T, bool kPerChannel, bool kZeroPoint, int kHeadDim>
__device__ __forceinline__ Multipliers static_multipliers(const T* scale, const T* zp, i32 head,
                                                          i32 element) {
  Multipliers m;
  if constexpr (kPerChannel) {
    load8(scale + head * kHeadDim + element, m.scale);
  } else {
    m = same_multiplier(to_float(scale[head]));
  }
  if constexpr (kZeroPoint) load8(zp + head * kHeadDim + element, m.zp);
  return m;
}

// Static arrays of a layer: quant multipliers for a writer, dequant multipliers for a reader. Null
// where the format has none.
struct StaticPointers {
  const void *k, *v, *k_zp, *v_zp;
};
