// SPDX-License-Identifier: Apache-2.0
// The query rows of an item: which keys each sees, and its fragments, with K's scale folded in.
//
// s = scale * dequant * q (code - zp): a scale per channel is multiplied into q, in float32; one per
// head, and softmax's own, become the row's factor. q, where the products are in fp16, is scaled by
// a power of two to where fp16 is widest. The zero point, and the bias that codes have in a product,
// give a constant per row, of the rounded q.
#pragma once
#include "paged/schedule.cuh"
#include "paged/shared.cuh"

struct Bounds {
  int low, high;              // keys that some row sees
  int clean_low, clean_high;  // keys that all rows see
};

// Called by a whole warp; every warp gets the same.
__device__ __forceinline__ Bounds find_bounds(const Params& p, Shared& sh) {
  const Request& r = sh.request;
  const Item& item = sh.item;
  Bounds all = {0x7fffffff, 0, 0, 0x7fffffff};
  for (int row = threadIdx.x % 32; row < item.rows; row += 32) {
    const int token = (item.row + row) / p.group, position = r.cached + token;
    int low = max(position - p.window + 1, 0);
    int high = p.causal ? min(position + 1, r.length) : r.length;
    if (p.mask_offsets != nullptr) {
      const int2 seen = *reinterpret_cast<const int2*>(p.mask_offsets + 2 * (r.first + token));
      low = max(low, seen.x), high = min(high, seen.y);
      if (seen.x < 0 || seen.x > seen.y || seen.y > r.length) {
        report_fault(p.faults, kFaultInterval, r.index);
      }
    }
    high = max(high, low);
    if (threadIdx.x < 32) sh.low[row] = low, sh.high[row] = high;
    if (low < high) all.low = min(all.low, low), all.high = max(all.high, high);
    all.clean_low = max(all.clean_low, low), all.clean_high = min(all.clean_high, high);
  }
  all.low = __reduce_min_sync(~0u, all.low), all.high = __reduce_max_sync(~0u, all.high);
  all.clean_low = __reduce_max_sync(~0u, all.clean_low);
  all.clean_high = __reduce_min_sync(~0u, all.clean_high);
  all.low = min(all.low, all.high);  // no row sees anything
  return all;
}

// Column c of 8 rows, by one warp.
__device__ __forceinline__ void load_query(const Params& p, Shared& sh, int c) {
  const Request& r = sh.request;
  const Item& item = sh.item;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = 8 * c + g;
  const int at = item.row + row;
  const FASTKV_Q* q = p.q + (r.first + at / p.group) * p.q_token +
                      (item.head * p.group + at % p.group) * p.q_head;
  float x[kDimSteps][4], most = 0.f;
#pragma unroll
  for (int step = 0; step < kDimSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int d = F::q_dim(step, t, i);
      x[step][i] = row < item.rows ? to_float(q[d]) : 0.f;
      if constexpr (kStaticScales && kPerChannel) {
        x[step][i] *= static_at(p.dequant.k, item.head * kD + d);
      }
      most = fmaxf(most, fabsf(x[step][i]));
    }
  }
  float factor = p.soft_cap != 0.f ? p.scale / p.soft_cap : p.scale * kLog2e;
  if constexpr (kStaticScales && !kPerChannel) factor *= static_at(p.dequant.k, item.head);
  if constexpr (Math::kExponent == 0x7c00u) {
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    // The largest becomes 2^7 ... 2^8. Exponents of the least normal number are the least there is.
    const int exponent = min(max(int(__float_as_uint(most) >> 23), 8), 254 - 8);
    const float up = __uint_as_float(u32(254 + 7 - exponent) << 23);
    factor *= __uint_as_float(u32(exponent - 7) << 23);
#pragma unroll
    for (int step = 0; step < kDimSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[step][i] *= up;
    }
  }
  // In this order, and unfused, in every specialization: a row's bits depend on it alone.
  float zero = 0.f;
#pragma unroll
  for (int step = 0; step < kDimSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[step][i] *= F::q_unit(i);
    const uint2 b = make_uint2(pack2<Math>(x[step][0], x[step][1]),
                               pack2<Math>(x[step][2], x[step][3]));
    sh.q[step][c][lane] = b;
    if constexpr (kShifts) {
      const float rounded[4] = {low_float(b.x, Math{}), high_float(b.x, Math{}),
                                low_float(b.y, Math{}), high_float(b.y, Math{})};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float point = F::kBias;
        if constexpr (kZeroPoints) {
          point += static_at(p.dequant.k_zp, item.head * kD + F::q_dim(step, t, i));
        }
        zero = __fmaf_rn(rounded[i] * (1.f / F::q_unit(i)), point, zero);
      }
    }
  }
  zero += __shfl_xor_sync(~0u, zero, 1);
  zero += __shfl_xor_sync(~0u, zero, 2);
  if (t == 0) sh.factor[row] = factor * F::kUnit, sh.shift[row] = __fmul_rn(-factor, zero);
}

// What write_output needs, loaded while the first tiles are on their way.
__device__ __forceinline__ void load_output_parameters(const Params& p, Shared& sh) {
  const Item& item = sh.item;
  for (int row = threadIdx.x; row < item.rows; row += kThreads) {
    const int head = item.head * p.group + (item.row + row) % p.group;
    sh.sink[row] = p.sinks == nullptr ? MINUS_INFINITY : p.sinks[head] * kLog2e;
  }
  if constexpr (kStaticScales) {
    for (int d = threadIdx.x; d < kD; d += kThreads) {
      const int channel = item.head * kD + d;
      sh.value_scale[d] = static_at(p.dequant.v, kPerChannel ? channel : item.head);
      if constexpr (kZeroPoints) {
        sh.value_zero[d] = static_at(p.dequant.v_zp, channel) + F::kBias;
      }
    }
  }
}
