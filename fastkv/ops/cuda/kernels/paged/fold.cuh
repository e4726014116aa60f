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

// What scales a fold and the next state, with maxima `m` and `next`, to their common one.
struct Scaling {
  float m, before, next;

  __device__ __forceinline__ Scaling(float m, float next)
      : m(fmaxf(m, next)), before(weight(m, this->m)), next(weight(next, this->m)) {}
};

__device__ __forceinline__ float fold_l(float l, float before, float next, float scale) {
  return __fmaf_rn(l, before, __fmul_rn(next, scale));
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
  rows[0] = x.m, rows[kRows] = x.l;
  if constexpr (kPagedScales) rows[2 * kRows] = x.top;
}

// Other blocks wrote it: past L1, which is not coherent.
__device__ __forceinline__ RowState load_row(const float* state, int row) {
  const float* rows = state + kRows * kD + row;
  return {__ldcg(rows), __ldcg(rows + kRows), kPagedScales ? __ldcg(rows + 2 * kRows) : 0.f};
}

// Where the state of a group lies: with the block that its first chunk falls to.
__device__ __forceinline__ float* group_state(const Params& p, const Share& s, const Item& item,
                                              int group) {
  const u32 block = s.owner(item.at + group * kGroup);
  const bool current = item.at >= s.start_of(block);
  return state_at(p, block, kEarlierGroups + (current ? p.max_groups : 0) + group);
}

// Whether this block is the last of those that add up to `total`; then their writes are visible. The
// barriers extend one thread's release and acquire to the block.
// Meanwhile another warp calls `find_node(i)` for each i, as the last block will need sh.node.
template <class FindNode>
__device__ __forceinline__ bool arrive(Shared& sh, u32* counter, u32 part, u32 total,
                                       const FindNode& find_node) {
  __syncthreads();
  if (threadIdx.x >= 32 && threadIdx.x < 32 + kGroup) find_node(int(threadIdx.x) - 32);
  if (threadIdx.x == 0) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(part)
                 : "memory");
    sh.arrived_last = before + part == total;
    if (before + part == total) *counter = 0;  // for the next item, or the next launch
  }
  __syncthreads();
  return sh.arrived_last;  // written again after another barrier
}

// A finished row of the output. V's scale and zero point enter here, once:
// out = sum p (code - zp) dequant / l = (O / l - zp) dequant.
__device__ __forceinline__ void write_output(const Params& p, const Shared& sh, int row, int vector,
                                             float4 sum, const RowState& state) {
  const Item& item = sh.item;
  const int at = item.row + row, of_request = quotient(at, p.group);
  const int token = sh.request.first + of_request;
  const int head = item.head * p.group + at - of_request * p.group;
  const bool empty = state.l == 0.f;  // NaN is not empty
  float share = empty ? 0.f : reciprocal(state.l);
  if constexpr (kPagedScales) share = empty ? 0.f : share * exp2_fast(state.top - state.m);
  const float lse2 = state.m + log2_fast(state.l);
  // Of the denominator, by keys and not by the sink.
  const float kept = reciprocal(__fadd_rn(1.f, exp2_fast(__fadd_rn(sh.sink[row], -lse2))));
  float x[4] = {__fmul_rn(sum.x, share), __fmul_rn(sum.y, share), __fmul_rn(sum.z, share),
                __fmul_rn(sum.w, share)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kStaticScales) {
      if constexpr (kShifts) x[i] -= kZeroPoints ? sh.value_zero[4 * vector + i] : F::kBias;
      x[i] = __fmul_rn(x[i], sh.value_scale[4 * vector + i]);
    }
    x[i] = empty ? 0.f : x[i] * kept;
  }
  store4(p.out + token * p.out_token + head * p.out_head + 4 * vector, x);
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

// Of each node and row: l, and the factors of the left fold up to it. 16 lanes hold a row's nodes,
// so that the maxima are a scan, and no exponential waits for another.
__device__ __forceinline__ void scale_nodes(Shared& sh, int count) {
  static_assert(kGroup == 16, "half a warp holds a row's nodes");
  NodeTable& table = sh.nodes;
  for (int i = threadIdx.x; i < kGroup * kRows; i += kThreads) {
    const int node = i % kGroup, row = i / kGroup;
    const bool there = node < count && row < sh.item.rows;
    const RowState x = there ? load_row(sh.node[node], row) : empty_row();
    float m = x.m, top = x.top;
#pragma unroll
    for (int k = 1; k < kGroup; k *= 2) {
      const float left = __shfl_up_sync(~0u, m, k, kGroup);
      if (node >= k) m = fmaxf(m, left);
    }
    const float m_before = __shfl_up_sync(~0u, m, 1, kGroup);
    table.l[node][row] = x.l;
    table.old_l[node][row] = node == 0 ? 0.f : weight(m_before, m);
    table.new_l[node][row] = weight(x.m, m);
    if constexpr (kPagedScales) {
#pragma unroll
      for (int k = 1; k < kGroup; k *= 2) {
        const float left = __shfl_up_sync(~0u, top, k, kGroup);
        if (node >= k) top = fmaxf(top, left);
      }
      const float top_before = __shfl_up_sync(~0u, top, 1, kGroup);
      table.old_sum[node][row] = node == 0 ? 0.f : weight(top_before, top);
      table.new_sum[node][row] = weight(x.top, top);
    }
    if (node == kGroup - 1) sh.row[0][row].m = m, sh.row[0][row].top = top;
  }
  __syncthreads();
}

// Where a warp's copies of nodes go: its free stage, and its other stages where `rooms` says so.
struct FoldRoom {
  u32 stages, free;  // shared addresses: of the warp's stages, of the one that is free
  int rooms;         // kStages where no tile is on its way or waits, else 1
};

// Copies of nodes' vectors, each lane's own; all of a round are in flight at once.
struct NodeCopies {
  static constexpr int kSlots = kStageBytes / 512 < kGroup ? kStageBytes / 512 : kGroup;
  FoldRoom room;

  __device__ __forceinline__ explicit NodeCopies(const FoldRoom& room) : room(room) {
    this->room.stages += threadIdx.x % 32 * 16;
    this->room.free += threadIdx.x % 32 * 16;
  }
  __device__ __forceinline__ u32 slots_of(int round) const {
    return room.rooms == 1 ? room.free : room.stages + round % kStages * kStageBytes;
  }

  // Past L1, as other blocks wrote them.
  __device__ __forceinline__ void start(const Shared& sh, int round, int base, int count,
                                        int at) const {
    const u32 to = slots_of(round);
#pragma unroll 4
    for (int k = 0; k < kSlots; ++k) {
      if (base + k < count) copy_async(to + 512 * k, sh.node[base + k] + at);
    }
  }
  __device__ __forceinline__ float4 get(int round, int slot) const {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(slots_of(round) + 512 * slot));
    return x;
  }
};

// Fold the states at sh.node[0 .. count), in order, and put the result. A round is kSlots nodes of
// one vector of a thread.
__device__ __noinline__ void fold_nodes(const Params& p, Shared& sh, int count, float* to,
                                        const FoldRoom room) {
  constexpr int kSlots = NodeCopies::kSlots;
  const int vectors = sh.item.rows * kVectors;
  const int each = kSlots == kGroup ? 1 : ceil_div(count, kSlots);  // rounds of a vector
  const NodeCopies copies(room);
  const auto start = [&](int round) {
    const int i = threadIdx.x + round / each * kThreads;
    const int at = i / kVectors * kD + i % kVectors * 4;
    if (i < vectors) copies.start(sh, round, round % each * kSlots, count, at);
  };
  const int ahead = room.rooms == 1 ? 1 : kStages;
#pragma unroll 1
  for (int round = 0; round < ahead; ++round) start(round);
  commit_copies();
  scale_nodes(sh, count);
  const NodeTable& table = sh.nodes;
  wait_copies<0>();
  for (int i = threadIdx.x, round = 0; i < vectors; i += kThreads) {
    const int row = i / kVectors;
    RowState state = sh.row[0][row];
    state.l = 0.f;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    for (int base = 0; base < count; base += kSlots, ++round) {
      if (round >= ahead) {
        start(round);
        commit_copies();
        wait_copies<0>();
      }
#pragma unroll 4
      for (int k = base; k < min(count, base + kSlots); ++k) {
        const float before = table.old_l[k][row], next = table.new_l[k][row];
        state.l = fold_l(state.l, before, table.l[k][row], next);
        const float4 x = copies.get(round, k - base);
        if constexpr (kPagedScales) {
          sum = fold_sums(sum, table.old_sum[k][row], x, table.new_sum[k][row]);
        } else {
          sum = fold_sums(sum, before, x, next);
        }
      }
    }
    put(p, sh, to, row, i % kVectors, sum, state);
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
__device__ __noinline__ void finish_group(const Params& p, Shared& sh, int group,
                                          const FoldRoom room) {
  const Share& s = sh.share;
  const Item& item = sh.item;
  const int groups = ceil_div(item.chunks, kGroup);
  if (groups == 1) return;
  // An item of this block alone needs no counter; its counter may serve the next item by now.
  const bool alone = item.at >= s.start && item.at + item.chunks <= s.end;
  const auto find_node = [&](int i) {
    if (i < groups) sh.node[i] = group_state(p, s, item, i);
  };
  if (alone) {
    if (group < groups - 1) return;
    if (threadIdx.x < kGroup) find_node(threadIdx.x);
    __syncthreads();
  } else if (!arrive(sh, p.counters + 2 * s.owner(item.at) + 1, 1, groups, find_node)) {
    return;
  }
  fold_nodes(p, sh, groups, nullptr, room);
}

// This block's `part` chunks of a split group are in the workspace: the last block folds them.
__device__ __noinline__ void finish_part(const Params& p, Shared& sh, int group, int part,
                                         const FoldRoom room) {
  const Share& s = sh.share;
  const Item& item = sh.item;
  const int first = group * kGroup, count = min(item.chunks - first, kGroup);
  const u32 at = item.at + first, owner = s.owner(at);
  // The owner's chunks are folded to one state; the others' lie one by one.
  const int folded = int(min(s.start_of(owner + 1) - at, u32(count)));
  const int nodes = 1 + count - folded;
  const auto find_node = [&](int i) {
    if (i >= nodes) return;
    const u32 chunk = at + folded + i - 1, block = i == 0 ? owner : s.owner(chunk);
    const int slot = i == 0 ? kPrefixSlot : int(chunk - max(s.start_of(block), at));
    sh.node[i] = state_at(p, block, slot);
  };
  if (!arrive(sh, p.counters + 2 * owner, part, count, find_node)) return;
  fold_nodes(p, sh, nodes, group_target(p, sh, group), room);
  finish_group(p, sh, group, room);
}
