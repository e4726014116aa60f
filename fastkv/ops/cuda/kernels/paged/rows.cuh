// SPDX-License-Identifier: Apache-2.0
// The query rows of an item: which keys each sees, and its fragments, with K's scale folded in.
//
// s = scale * dequant * q (code - zp): a scale per channel is multiplied into q, in float32; one per
// head, and softmax's own, become the row's factor. q, where the products are in fp16, is scaled by
// a power of two to where fp16 is widest. The zero point, and the bias that codes have in a product,
// give a constant per row, of the rounded q.
#pragma once
#include "paged/schedule.cuh"
#include "common/tensor_core.cuh"
#include "paged/shared.cuh"

struct Bounds {
  int low, high;              // keys that some row sees
  int clean_low, clean_high;  // keys that all rows see
};

// Keys that a token of the request sees by its position alone.
__device__ __forceinline__ int2 keys_of(const Params& p, const Request& r, int token) {
  const int position = r.cached + token;
  return {max(position - p.window + 1, 0), p.causal ? min(position + 1, r.length) : r.length};
}

// Called by a whole warp; every warp gets the same.
__device__ __forceinline__ Bounds find_bounds(const Params& p, Shared& sh) {
  const Request& r = sh.request;
  const Item& item = sh.item;
  Bounds all = {0x7fffffff, 0, 0, 0x7fffffff};
  if (p.mask_offsets == nullptr) {  // they grow with the position
    const int2 first = keys_of(p, r, quotient(item.row, p.group));
    const int2 last = keys_of(p, r, quotient(item.row + item.rows - 1, p.group));
    all = {min(first.x, last.y), last.y, last.x, first.y};
    for (int row = threadIdx.x; row < item.rows; row += kThreads) {
      const int2 keys = keys_of(p, r, quotient(item.row + row, p.group));
      sh.low[row] = keys.x, sh.high[row] = max(keys.x, keys.y);
    }
    return all;
  }
  for (int row = threadIdx.x % 32; row < item.rows; row += 32) {
    const int token = quotient(item.row + row, p.group);
    const int2 keys = keys_of(p, r, token);
    const int2 seen = *reinterpret_cast<const int2*>(p.mask_offsets + 2 * (r.first + token));
    const int low = max(keys.x, seen.x), high = max(min(keys.y, seen.y), low);
    if (seen.x < 0 || seen.x > seen.y || seen.y > r.length) {
      report_fault(p.faults, kFaultInterval, r.index);
    }
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

// Start the copy of the item's rows of q to shared memory, ahead of the tiles: behind them it would
// wait for all that is in flight.
__device__ __forceinline__ void fetch_query(const Params& p, Shared& sh) {
  constexpr int kElements = 16 / sizeof(FASTKV_Q), kVectorsOfRow = kD / kElements;
  const Item& item = sh.item;
  for (int i = threadIdx.x; i < item.rows * kVectorsOfRow; i += kThreads) {
    const int row = i / kVectorsOfRow, at = item.row + row, d = i % kVectorsOfRow * kElements;
    const int token = quotient(at, p.group), head = item.head * p.group + at - token * p.group;
    const FASTKV_Q* from = p.q + (sh.request.first + token) * p.q_token + head * p.q_head + d;
    copy_async(shared_address(&sh.query[row][d]), from);
  }
  commit_copies();
}

__device__ __forceinline__ void prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// Bring to L2 what the start of the block's next item waits for: by then the tiles of this one would
// have driven it out.
__device__ __forceinline__ void prefetch_next_item(const Params& p, const Shared& sh) {
  const Request& r = sh.request;
  const u32 next = sh.item.at + sh.item.chunks;
  if (threadIdx.x >= 32 || next >= sh.share.end) return;
  const bool same = next < sh.share.request_at + r.work;
  const int lane = threadIdx.x, request = r.index + (same ? 0 : 1);
  const void* at = nullptr;
  if (lane < 8) {  // the first lines of the table's row
    const TableShape& table = p.table;
    if (32 * lane < table.columns) {
      at = p.block_table + request * table.row + 32 * lane * table.column;
    }
  } else if (lane == 8) {
    at = p.cu_seqlens_q + request + 1;
  } else if (lane == 9) {
    at = p.cache_seqlens + request;
  } else if (lane >= 16) {  // and of q's rows
    const int token = same ? r.first : r.first + r.rows / p.group, row = (lane - 16) / 2;
    const int head = (same ? sh.item.head + 1 : 0) % p.kv_heads * p.group + row;
    if (token < p.tokens && row < p.group) {
      at = p.q + token * p.q_token + head * p.q_head + lane % 2 * (kD / 2);
    }
  }
  if (at != nullptr) prefetch(at);
}

// What else the item needs from global memory: loaded in front of the tiles, stored behind them.
struct ItemParameters {
  static constexpr int kEach = (kD + kThreads - 1) / kThreads;  // channels of a thread
  float sink, value_scale[kEach], value_zero[kEach], key_scale[kEach], key_zero[kEach];

  __device__ __forceinline__ void load(const Params& p, const Shared& sh) {
    const Item& item = sh.item;
    const int row = threadIdx.x;
    sink = MINUS_INFINITY;
    if (p.sinks != nullptr && row < item.rows) {
      const int at = item.row + row, token = quotient(at, p.group);
      sink = p.sinks[item.head * p.group + at - token * p.group] * kLog2e;
    }
    if constexpr (kStaticScales) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int d = threadIdx.x + i * kThreads, channel = item.head * kD + d;
        if (d >= kD) break;
        value_scale[i] = static_at(p.dequant.v, kPerChannel ? channel : item.head);
        key_scale[i] = static_at(p.dequant.k, kPerChannel ? channel : item.head);
        if constexpr (kZeroPoints) {
          value_zero[i] = static_at(p.dequant.v_zp, channel) + F::kBias;
          key_zero[i] = static_at(p.dequant.k_zp, channel) + F::kBias;
        }
      }
    }
  }
  __device__ __forceinline__ void store(Shared& sh) const {
    if (threadIdx.x < kRows) sh.sink[threadIdx.x] = sink;
    if constexpr (kStaticScales) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int d = threadIdx.x + i * kThreads;
        if (d >= kD) break;
        sh.value_scale[d] = value_scale[i];
        if (kPerChannel || d == 0) sh.key_scale[d] = key_scale[i];
        if constexpr (kZeroPoints) sh.value_zero[d] = value_zero[i], sh.key_zero[d] = key_zero[i];
      }
    }
  }
};

// Fragments of column c of 8 rows, by one warp, from the rows in shared memory.
__device__ __forceinline__ void load_query(const Params& p, Shared& sh, int c) {
  const Item& item = sh.item;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = 8 * c + g;
  float x[kDimSteps][4], most = 0.f;
#pragma unroll
  for (int step = 0; step < kDimSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int d = F::q_dim(step, t, i);
      x[step][i] = row < item.rows ? to_float(sh.query[row][d]) : 0.f;
      if constexpr (kKeyChannels) x[step][i] *= sh.key_scale[d];
      most = fmaxf(most, fabsf(x[step][i]));
    }
  }
  float factor = p.soft_cap != 0.f ? p.scale / p.soft_cap : p.scale * kLog2e;
  if constexpr (kStaticScales && !kPerChannel) factor *= sh.key_scale[0];
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
        if constexpr (kZeroPoints) point = sh.key_zero[F::q_dim(step, t, i)];
        zero = __fmaf_rn(rounded[i] * (1.f / F::q_unit(i)), point, zero);
      }
    }
  }
  zero += __shfl_xor_sync(~0u, zero, 1);
  zero += __shfl_xor_sync(~0u, zero, 2);
  if (t == 0) {
    const float unit = fminf(fmaxf(factor * F::kUnit, -3e38f), 3e38f);  // an infinity times 0 is NaN
    sh.factor[row] = unit, sh.shift[row] = __fmul_rn(-factor, zero);
  }
}
