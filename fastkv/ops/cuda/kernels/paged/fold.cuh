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
#include "paged/schedule.cuh"
#include "paged/shared.cuh"

constexpr int kStateFloats = kRows * kD + 3 * kRows;
constexpr int kPrefixSlot = kGroup - 1;
constexpr int kEarlierGroups = kGroup;
constexpr int kCurrentGroups = kEarlierGroups + kMaxGroups;
constexpr int kSlots = kCurrentGroups + kMaxGroups;
constexpr int kVectors = kD / 4;  // of a row

// One (request, row tile, KV head), and where it stands.
struct Item {
  int head;
  int row;        // first row of its tile, within the request
  int rows;       // of the tile, at most kRows
  u32 at;         // its chunk 0 in the launch's order
  int chunks;
};

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
  return p.states + (i64(block) * kSlots + slot) * kStateFloats;
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
  return state_at(p, block, (current ? kCurrentGroups : kEarlierGroups) + group);
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

// Fold the states at sh.node[0 .. count), in order, and give each thread its part of O.
template <class Emit>
__device__ __forceinline__ void fold_nodes(Shared& sh, int count, int rows, const Emit& emit) {
  NodeTable& table = sh.nodes;
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
  for (int i = threadIdx.x; i < rows * kVectors; i += kThreads) {
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
    emit(row, i % kVectors, sum, sh.row[0][row]);
  }
  __syncthreads();
}

// A finished row of the output. V's scale and zero point enter here, once:
// out = sum p (code - zp) dequant / l = (O / l - zp) dequant.
__device__ __forceinline__ void write_output(const Params& p, const Request& r, const Item& item,
                                             int row, int vector, float4 sum,
                                             const RowState& state) {
  const int at = item.row + row, token = r.first + at / p.G;
  const int head = item.head * p.G + at % p.G;
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
      if constexpr (kZeroPoints) x[i] -= to_float(p.v_zp[channel]);
      x[i] *= to_float(p.v_dequant[kPerChannel ? channel : item.head]);
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
    p.lse[i64(token) * p.Hkv * p.G + head] = empty ? MINUS_INFINITY : lse2 * kLn2;
  }
}

// A group is done: it is the whole item, or it goes to the workspace and the last one folds all.
template <class Give>
__device__ __forceinline__ void finish_group(const Params& p, Shared& sh, const Share& s,
                                             const Request& r, const Item& item, int group,
                                             const Give& give) {
  const auto output = [&](int row, int vector, float4 sum, const RowState& state) {
    write_output(p, r, item, row, vector, sum, state);
  };
  const int groups = ceil_div(item.chunks, kGroup);
  if (groups == 1) {
    give(output);
    return;
  }
  float* to = group_state(p, s, item, group);
  give([&](int row, int vector, float4 sum, const RowState& state) {
    __stcg(reinterpret_cast<float4*>(to + row * kD + 4 * vector), sum);
    if (vector == 0) store_row(to, row, state);
  });
  // An item of this block alone needs no counter; its counter may serve the next item by now.
  const bool alone = item.at >= s.start && item.at + item.chunks <= s.end;
  if (alone) __syncthreads();
  if (alone ? group == groups - 1
            : arrive(sh, p.counters + 2 * s.owner(item.at) + 1, 1, groups)) {
    if (threadIdx.x < groups) sh.node[threadIdx.x] = group_state(p, s, item, threadIdx.x);
    __syncthreads();
    fold_nodes(sh, groups, item.rows, output);
  }
}

// A block's part of a split group is in the workspace: the last one folds the group.
__device__ __forceinline__ void finish_part(const Params& p, Shared& sh, const Share& s,
                                            const Request& r, const Item& item, int group,
                                            int part) {
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
  __syncthreads();
  finish_group(p, sh, s, r, item, group,
               [&](const auto& emit) { fold_nodes(sh, nodes, item.rows, emit); });
}
