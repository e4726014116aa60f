// SPDX-License-Identifier: Apache-2.0
// K and V as the model computes them, rounded to FASTKV_STORAGE.
#pragma once

#include "common/multipliers.cuh"

struct Codec {
  using Storage = FASTKV_STORAGE;
  static constexpr int kBits = 8 * int(sizeof(Storage));
  static constexpr Scales kScales = Scales::kNone;
  static constexpr bool kZeroPoint = false;

  static __device__ __forceinline__ void encode(const float (&x)[8], const Multipliers&,
                                                u32 (&stored)[kBits / 4]) {
    pack8<Storage>(x, stored);
  }

  static __device__ __forceinline__ void decode(const u32 (&stored)[kBits / 4], const Multipliers&,
                                                float (&x)[8]) {
    unpack8<Storage>(stored, x);
  }
};
