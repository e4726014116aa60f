// SPDX-License-Identifier: Apache-2.0
// Attention of new tokens over the pages of their requests: split over keys, merged in one launch.
//
// Grid: the blocks that are resident at once, or fewer; each finds its share from the lengths.
// Block: kWarps warps, each with kStages tiles of K and V of its own in shared memory.
// Shared memory: Shared (shared.cuh), then the warps' stages.
// Shapes: q [T, Hq, D], K and V [N, Hkv, P, D_storage] at any strides of 16 bytes, P a power of 2
// and at least 16.
//
// A row's result depends on its request alone, bit for bit: keys fall into chunks at multiples of
// C(L), tiles into warps by position, and states fold in one order (schedule.cuh, fold.cuh).
#include "common/grid.cuh"
#include "paged/tile.cuh"

// Rows first .. first + rows - 1 of a chunk: this warp's state to shared memory.
__device__ __forceinline__ void share_state(const WarpState& w, Shared& sh, float* sums, int first,
                                            int rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int c = first / 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const RowState state = w.row(c, i);
    const int row = 8 * c + 2 * t + i - first;
    if (row < 0 || row >= rows) continue;
    if (g == 0) sh.warp_row[warp][first + row] = state;
    F::store(sums + row * kSumPitch, w.o[c], g, i);
  }
  if (lane == 0) sh.warp_sum[warp] = sums;
}

// The warps' states of a row, and a vector of it, to one.
__device__ __forceinline__ RowState join_warps(const Shared& sh, int at, int row, int vector,
                                               float4& sum) {
  RowState joined = empty_row();
  RowState x[kWarps];
#pragma unroll
  for (int k = 0; k < kWarps; ++k) {
    x[k] = sh.warp_row[k][at];
    joined.m = fmaxf(joined.m, x[k].m), joined.top = fmaxf(joined.top, x[k].top);
  }
  sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int k = 0; k < kWarps; ++k) {
    float scale = weight(x[k].m, joined.m);
    joined.l = __fmaf_rn(x[k].l, scale, joined.l);
    if constexpr (kPagedScales) scale = weight(x[k].top, joined.top);
    const float4 y = reinterpret_cast<const float4*>(sh.warp_sum[k] + row * kSumPitch)[vector];
    sum = {__fmaf_rn(y.x, scale, sum.x), __fmaf_rn(y.y, scale, sum.y),
           __fmaf_rn(y.z, scale, sum.z), __fmaf_rn(y.w, scale, sum.w)};
  }
  return joined;
}

// The chunk's states of the warps, to one; folded into the group's, or to `to`. `sums` is in the
// warp's free stage.
__device__ __forceinline__ void finish_chunk(const WarpState& w, Shared& sh, float* sums, bool first,
                                             int& turn, float* to) {
  __syncwarp();  // all lanes have read what the free stage held
#pragma unroll
  for (int from = 0; from < kRows; from += kPassRows) {
    const int rows = min(sh.item.rows - from, kPassRows);
    if (rows <= 0) break;
    share_state(w, sh, sums, from, rows);
    __syncthreads();
    for (int i = threadIdx.x; i < rows * kVectors; i += kThreads) {
      const int row = i / kVectors, vector = i % kVectors, at = from + row;
      float4 sum;
      const RowState state = join_warps(sh, at, row, vector, sum);
      if (to != nullptr) {
        __stcg(reinterpret_cast<float4*>(to + at * kD + 4 * vector), sum);
        if (vector == 0) store_row(to, at, state);
        continue;
      }
      float4& total = *reinterpret_cast<float4*>(&sh.sum[at][4 * vector]);
      const RowState before = first ? empty_row() : sh.row[turn][at];
      const Scaling l(before.m, state.m), top(before.top, state.top);
      const Scaling& scaling = kPagedScales ? top : l;
      total = fold_sums(first ? float4{0.f, 0.f, 0.f, 0.f} : total, scaling.before, sum,
                        scaling.next);
      if (vector == 0) {
        sh.row[1 - turn][at] = {l.m, fold_l(before.l, l.before, state.l, l.next), top.m};
      }
    }
    __syncthreads();
  }
  turn = 1 - turn;
}

// Chunks [begin, end) of the item: this block's share of it.
__device__ __forceinline__ void attend(const Params& p, Shared& sh, int begin, int end) {
  const Bounds see = find_bounds(p, sh);
  const int chunk_tokens = sh.request.chunk, first = sh.request.chunk_first;
  const int low = max(see.low, (first + begin) * chunk_tokens);
  const int high = max(min(see.high, (first + end) * chunk_tokens), low);
  u8* stages = reinterpret_cast<u8*>(&sh) + kSharedBytes;
  stages += threadIdx.x / 32 * (kStages * kStageBytes);
  Stream stream(p, sh, low, high, shared_address(stages));
  ItemParameters parameters;
  fetch_query(p, sh);
  parameters.load(p, sh);
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) stream.issue();
  parameters.store(sh);
  wait_copies<kStages - 1>();
  __syncthreads();
  for (int c = threadIdx.x / 32; c < kColumns; c += kWarps) load_query(p, sh, c);
  __syncthreads();
  const Query query(sh);

  int tile = 0, turn = 0;
  WarpState w;
  for (int chunk = begin; chunk < end; ++chunk) {
    w.clear();
    if (chunk + 1 == end) prefetch_next_item(p, sh);
    const int stop = (first + chunk + 1) * chunk_tokens;
    for (; tile < stream.tiles && stream.token(tile) < stop; ++tile) {
      stream.wait();
      stream.issue();
      attend_tile(w, p, sh, query, stream, see, tile);
    }
    const int group = chunk / kGroup, group_begin = max(group * kGroup, begin);
    const int group_end = min((group + 1) * kGroup, sh.item.chunks);
    const bool folds = group_begin == group * kGroup;
    float* to = folds ? nullptr : state_at(p, blockIdx.x, chunk - group_begin);
    FoldRoom room = {stream.stages, stream.stage(stream.issued), 1};
    if (chunk + 1 == end) room.rooms = kStages;
    float* sums = reinterpret_cast<float*>(stages + (room.free - room.stages));
    finish_chunk(w, sh, sums, chunk == group_begin, turn, to);
    if (chunk + 1 < min(group_end, end)) continue;
    if (folds && chunk + 1 == group_end) {
      put_sum(p, sh, turn, group_target(p, sh, group));
      finish_group(p, sh, group, room);
    } else {
      if (folds) put_sum(p, sh, turn, state_at(p, blockIdx.x, kPrefixSlot));
      finish_part(p, sh, group, chunk + 1 - group_begin, room);
    }
  }
  wait_copies<0>();
  __syncthreads();  // the next item writes what this one read
}

// Rows of nobody: behind the last request 0 and -inf; before the first one they are left alone, but
// what the op made itself is written everywhere.
__device__ __forceinline__ void clear_rows(const Params& p, int begin, int end) {
  begin = min(max(begin, 0), p.tokens);
  end = min(max(end, begin), p.tokens);
  const int before = p.fresh || p.lse != nullptr ? begin : 0, heads = p.kv_heads * p.group;
  const i64 count = i64(before + p.tokens - end) * heads * kVectors;
  for (i64 i = blockIdx.x * kThreads + threadIdx.x; i < count; i += i64(gridDim.x) * kThreads) {
    const int vector = i % kVectors, head = i / kVectors % heads;
    int token = int(i / kVectors / heads);
    if (token >= before) token += end - before;
    FASTKV_Q* out = p.out + token * p.out_token + head * p.out_head + 4 * vector;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (token >= begin || p.fresh) out[j] = from_float<FASTKV_Q>(0.f);
    }
    if (p.lse != nullptr && vector == 0) p.lse[i64(token) * heads + head] = MINUS_INFINITY;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, FASTKV_BLOCKS)
    paged_attention(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 memory[];
  Shared& sh = *reinterpret_cast<Shared*>(memory);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int begin_rows = p.cu_seqlens_q[0], end_rows = p.cu_seqlens_q[p.table.requests];
  find_share(p, sh);
  for (u32 at = sh.share.start; at < sh.share.end;) {  // sh.item is the first
    const int begin = int(at - sh.item.at);
    const int end = min(sh.item.chunks, begin + int(sh.share.end - at));
    attend(p, sh, begin, end);
    at += end - begin;
    if (at >= sh.share.end) break;
    if (threadIdx.x == 0) sh.item = find_item(p, sh.share, sh.request, at);
    __syncthreads();
  }
  clear_rows(p, begin_rows, end_rows);
}
