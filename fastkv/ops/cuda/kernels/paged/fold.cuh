// SPDX-License-Identifier: Apache-2.0
// From the states of chunks to rows of the output.
//
// States fold in one order, whoever computes them: the warps of a chunk, the chunks of a group, the
// groups of an item. A group of one block stays in shared memory; of a split one, each block writes
// its chunks' states (its first chunks, if they begin the group, folded to one) to the workspace,
// and the block that arrives last folds them. Items of several groups go the same way.
//
// Workspace of a block, in states: kGroup - 1 chunks of a group that began before its share, one
// folded beginning of a group that ends after it, then the groups of the item that began before its
// share, then those of its current item.
#pragma once
#include "paged/shared.cuh"

constexpr int kStateFloats = kRows * kD + 3 * kRows;
constexpr int kPrefixSlot = kGroup - 1;
constexpr int kEarlierGroups = kGroup;
constexpr int kVectors = kD / 4;  // of a row

__device__ __forceinline__ float weight(float m, float total) {
  return m == MINUS_INFINITY ? 0.f : exp2_fast(m - total);
}

__device__ __forceinline__ RowState empty_row() {
  return {MINUS_INFINITY, 0.f, MINUS_INFINITY};
}

// state := state folded with next; `a` and `b` scale their O.
__device__ __forceinline__ void fold_rows(RowState& state, const RowState& next, float& a,
                                          float& b) {
  const float m = fmaxf(state.m, next.m);
  a = weight(state.m, m), b = weight(next.m, m);
  state.l = __fmaf_rn(state.l, a, __fmul_rn(next.l, b));
  state.m = m;
  if constexpr (kPagedScales) {
    const float top = fmaxf(state.top, next.top);
    a = weight(state.top, top), b = weight(next.top, top);
    state.top = top;
  }
}

__device__ __forceinline__ float4 fold_sums(float4 x, float a, float4 y, float b) {
  return {__fmaf_rn(x.x, a, __fmul_rn(y.x, b)), __fmaf_rn(x.y, a, __fmul_rn(y.y, b)),
          __fmaf_rn(x.z, a, __fmul_rn(y.z, b)), __fmaf_rn(x.w, a, __fmul_rn(y.w, b))};
}

__device__ __forceinline__ float* state_at(const Params& p, u32 block, int slot) {
  return p.states + (i64(block) * (kGroup + 2 * p.max_groups) + slot) * kStateFloats;
}

__device__ __forceinline__ void store_row(float* state, int row, const RowState& x) {
  float* rows = state + kRows * kD + row;
  rows[0] = x.m, rows[kRows] = x.l, rows[2 * kRows] = x.top;
}

// Other blocks wrote it: past L1, which is not coherent.
__device__ __forceinline__ RowState load_row(const float* state, int row) {
  const float* rows = state + kRows * kD + row;
  return {__ldcg(rows), __ldcg(rows + kRows), __ldcg(rows + 2 * kRows)};
}

// Where the state of a group lies: with the block that its first chunk falls to.
__device__ __forceinline__ float* group_state(const Params& p, const Share& s, const Item& item,
                                              int group) {
  const u32 block = s.owner(item.at + group * kGroup);
  const bool current = item.at >= s.start_of(block);
  return state_at(p, block, kEarlierGroups + (current ? p.max_groups : 0) + group);
}

// Whether this block is the last of those that add up to `total`; then their writes are visible.
__device__ __forceinline__ bool arrive(Shared& sh, u32* counter, u32 part, u32 total) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const u32 before = atomicAdd(counter, part);
    sh.scratch[0] = before + part == total;
    if (before + part == total) *counter = 0;  // for the next item, or the next launch
  }
  __syncthreads();
  const bool last = sh.scratch[0];
  if (last) __threadfence();
  __syncthreads();
  return last;
}

// A finished row of the output. V's scale and zero point enter here, once:
// out = sum p (code - zp) dequant / l = (O / l - zp) dequant.
__device__ __forceinline__ void write_output(const Params& p, const Shared& sh, int row, int vector,
                                             float4 sum, const RowState& state) {
  const Item& item = sh.item;
  const int at = item.row + row, token = sh.request.first + at / p.group;
  const int head = item.head * p.group + at % p.group;
  const bool empty = state.l == 0.f;  // NaN is not empty
  float share = empty ? 0.f : 1.f / state.l;
  if constexpr (kPagedScales) share = empty ? 0.f : share * exp2_fast(state.top - state.m);
  const float lse2 = state.m + log2_fast(state.l);
  float kept = 1.f;  // of the denominator, by keys and not by the sink
  if (p.sinks != nullptr) kept = 1.f / (1.f + exp2_fast(p.sinks[head] * kLog2e - lse2));
  float x[4] = {sum.x * share, sum.y * share, sum.z * share, sum.w * share};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kStaticScales) {
      const int channel = item.head * kD + 4 * vector + i;
      if constexpr (kZeroPoints) x[i] -= static_at(p.dequant.v_zp, channel);
      x[i] *= static_at(p.dequant.v, kPerChannel ? channel : item.head);
    }
    x[i] = empty ? 0.f : x[i] * kept;
  }
  FASTKV_Q* out = p.out + token * p.out_token + head * p.out_head + 4 * vector;
  if constexpr (sizeof(FASTKV_Q) == 2) {
    *reinterpret_cast<uint2*>(out) = make_uint2(pack2<FASTKV_Q>(x[0], x[1]),
                                                pack2<FASTKV_Q>(x[2], x[3]));
  } else {
    *reinterpret_cast<float4*>(out) = make_float4(x[0], x[1], x[2], x[3]);
  }
  if (p.lse != nullptr && vector == 0) {
    p.lse[i64(token) * p.kv_heads * p.group + head] = empty ? MINUS_INFINITY : lse2 * kLn2;
  }
}

// To a state in the workspace, or, where `to` is null, to the output.
__device__ __forceinline__ void put(const Params& p, const Shared& sh, float* to, int row,
                                    int vector, float4 sum, const RowState& state) {
  if (to == nullptr) {
    write_output(p, sh, row, vector, sum, state);
    return;
  }
  __stcg(reinterpret_cast<float4*>(to + row * kD + 4 * vector), sum);
  if (vector == 0) store_row(to, row, state);
}

// Fold the states at sh.node[0 .. count), in order, and put the result.
__device__ __noinline__ void fold_nodes(const Params& p, Shared& sh, int count, float* to) {
  NodeTable& table = sh.nodes;
  __syncthreads();
  for (int i = threadIdx.x; i < count * kRows; i += kThreads) {
    const RowState x = load_row(sh.node[i / kRows], i % kRows);
    table.m[i / kRows][i % kRows] = x.m;
    table.l[i / kRows][i % kRows] = x.l;
    table.top[i / kRows][i % kRows] = x.top;
  }
  __syncthreads();
  if (threadIdx.x < kRows) {
    RowState state = empty_row();
    for (int i = 0; i < count; ++i) {
      const RowState next = {table.m[i][threadIdx.x], table.l[i][threadIdx.x],
                             table.top[i][threadIdx.x]};
      float a, b;
      fold_rows(state, next, a, b);
      table.m[i][threadIdx.x] = a, table.l[i][threadIdx.x] = b;
    }
    sh.row[0][threadIdx.x] = state;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < sh.item.rows * kVectors; i += kThreads) {
    const int row = i / kVectors, at = row * kD + i % kVectors * 4;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    for (int base = 0; base < count; base += 8) {
      float4 x[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (base + j < count) {
          x[j] = __ldcg(reinterpret_cast<const float4*>(sh.node[base + j] + at));
        }
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (base + j < count) {
          sum = fold_sums(sum, table.m[base + j][row], x[j], table.l[base + j][row]);
        }
      }
    }
    put(p, sh, to, row, i % kVectors, sum, sh.row[0][row]);
  }
  __syncthreads();
}

// The running fold, to where `to` says.
__device__ __noinline__ void put_sum(const Params& p, const Shared& sh, int turn, float* to) {
  for (int i = threadIdx.x; i < sh.item.rows * kVectors; i += kThreads) {
    const int row = i / kVectors, vector = i % kVectors;
    put(p, sh, to, row, vector, *reinterpret_cast<const float4*>(&sh.sum[row][4 * vector]),
        sh.row[turn][row]);
  }
}

// Where a finished group goes: an item of one group is the output.
__device__ __forceinline__ float* group_target(const Params& p, const Shared& sh, int group) {
  return sh.item.chunks <= kGroup ? nullptr : group_state(p, sh.share, sh.item, group);
}

// A group of several is where it belongs; the last one folds them all.
__device__ __noinline__ void finish_group(const Params& p, Shared& sh, int group) {
  const Share& s = sh.share;
  const Item& item = sh.item;
  const int groups = ceil_div(item.chunks, kGroup);
  if (groups == 1) return;
  // An item of this block alone needs no counter; its counter may serve the next item by now.
  const bool alone = item.at >= s.start && item.at + item.chunks <= s.end;
  if (alone) __syncthreads();
  if (alone ? group < groups - 1
            : !arrive(sh, p.counters + 2 * s.owner(item.at) + 1, 1, groups)) {
    return;
  }
  if (threadIdx.x < groups) sh.node[threadIdx.x] = group_state(p, s, item, threadIdx.x);
  fold_nodes(p, sh, groups, nullptr);
}

// This block's `part` chunks of a split group are in the workspace: the last block folds them.
__device__ __noinline__ void finish_part(const Params& p, Shared& sh, int group, int part) {
  const Share& s = sh.share;
  const Item& item = sh.item;
  const int first = group * kGroup, count = min(item.chunks - first, kGroup);
  const u32 at = item.at + first, owner = s.owner(at);
  if (!arrive(sh, p.counters + 2 * owner, part, count)) return;
  // The owner's chunks are folded to one state; the others' lie one by one.
  const int folded = int(min(s.start_of(owner + 1) - at, u32(count)));
  const int nodes = 1 + count - folded;
  if (threadIdx.x < nodes) {
    const u32 chunk = at + folded + threadIdx.x - 1;
    const u32 block = threadIdx.x == 0 ? owner : s.owner(chunk);
    const int slot = threadIdx.x == 0 ? kPrefixSlot : int(chunk - max(s.start_of(block), at));
    sh.node[threadIdx.x] = state_at(p, block, slot);
  }
  fold_nodes(p, sh, nodes, group_target(p, sh, group));
  finish_group(p, sh, group);
}
