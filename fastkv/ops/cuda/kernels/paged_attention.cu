// SPDX-License-Identifier: Apache-2.0
// Attention of new tokens over the pages of their requests: split over keys, merged in one launch.
//
// Grid: the blocks that are resident at once, or fewer; each finds its share from the lengths.
// Block: 128 threads, 4 warps, each with kStages tiles of K and V of its own in shared memory.
// Shared memory: Shared (shared.cuh), then the warps' stages.
// Shapes: q [T, Hq, D], K and V [N, Hkv, P, D_storage] at any strides of 16 bytes, P a power of 2
// and at least 16.
//
// A row's result depends on its request alone, bit for bit: keys fall into chunks at multiples of
// C(L), tiles into warps by position, and states fold in one order (schedule.cuh, fold.cuh).
#include "common/grid.cuh"
#include "paged/rows.cuh"
#include "paged/tile.cuh"

// The chunk's states of the four warps, to one; folded into the group's (`fold`), or to `to`.
__device__ __forceinline__ void finish_chunk(const WarpState& w, Shared& sh, const Item& item,
                                             bool first, int& turn, float* to) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int rows = min(item.rows - 8 * c, 8);
    if (rows <= 0) break;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowState row = w.row(c, i);
      if (g == 0) sh.warp_row[warp][8 * c + 2 * t + i] = row;
      if (2 * t + i < rows) {
#pragma unroll
        for (int d = 0; d < kDimSteps; ++d) {
          sh.warp_sum[warp][2 * t + i][F::out_dim(d, g, 0)] = w.o[c][d][i];
          sh.warp_sum[warp][2 * t + i][F::out_dim(d, g, 1)] = w.o[c][d][i + 2];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * kVectors; i += kThreads) {
      const int row = i / kVectors, vector = i % kVectors, at = 8 * c + row;
      RowState state = empty_row();
      float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        float a, b;
        fold_rows(state, sh.warp_row[k][at], a, b);
        const float4 x = *reinterpret_cast<const float4*>(&sh.warp_sum[k][row][4 * vector]);
        sum = fold_sums(sum, a, x, b);
      }
      if (to != nullptr) {
        __stcg(reinterpret_cast<float4*>(to + at * kD + 4 * vector), sum);
        if (vector == 0) store_row(to, at, state);
      } else {
        float4& total = *reinterpret_cast<float4*>(&sh.sum[at][4 * vector]);
        RowState before = first ? empty_row() : sh.row[turn][at];
        float a, b;
        fold_rows(before, state, a, b);
        total = fold_sums(first ? float4{0.f, 0.f, 0.f, 0.f} : total, a, sum, b);
        if (vector == 0) sh.row[1 - turn][at] = before;
      }
    }
    __syncthreads();
  }
  turn = 1 - turn;
}

// Chunks [begin, end) of an item: this block's share of it.
__device__ void attend(const Params& p, Shared& sh, const Share& s, const Request& r,
                       const Item& item, int begin, int end) {
  const Bounds see = find_bounds(p, sh, r, item);
  for (int c = threadIdx.x / 32; c < kColumns; c += kWarps) load_query(p, sh, r, item, c);
  __syncthreads();
  const Query query(sh);
  const int from = (r.chunk_first + begin) * r.chunk, until = (r.chunk_first + end) * r.chunk;
  const int low = max(see.low, from), high = max(min(see.high, until), low);
  u8* stages = reinterpret_cast<u8*>(&sh) + kSharedBytes;
  stages += threadIdx.x / 32 * (kStages * kStageBytes);
  Stream stream(p, sh, r.index, item.head, low, high, shared_address(stages));
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) stream.issue();

  int tile = 0, turn = 0;
  [[maybe_unused]] float k_scale = 0.f, v_scale = 0.f;
  const auto fetch_scales = [&](int at, float& k, float& v) {
    k = stream.token_scale(p.k_scale, p.k_scale_page, p.k_scale_head, p.k_scale_slot, at);
    v = stream.token_scale(p.v_scale, p.v_scale_page, p.v_scale_head, p.v_scale_slot, at);
  };
  if constexpr (kPagedScales) {
    __syncwarp();
    fetch_scales(0, k_scale, v_scale);
  }
  WarpState w;
  for (int chunk = begin; chunk < end; ++chunk) {
    w.clear();
    const int stop = (r.chunk_first + chunk + 1) * r.chunk;
    for (; tile < stream.tiles && stream.token(tile) < stop; ++tile) {
      stream.wait();
      stream.issue();
      [[maybe_unused]] float next_k = 0.f, next_v = 0.f;
      if constexpr (kPagedScales) {
        __syncwarp();
        fetch_scales(tile + 1, next_k, next_v);
      }
      TileMask mask;
      mask.token = stream.token(tile);
      mask.clean = mask.token >= see.clean_low && mask.token + kTile <= see.clean_high;
#pragma unroll
      for (int i = 0; i < F::kBlocks; ++i) {
        mask.there[i] = stream.page(tile, i) >= 0;
        mask.clean = mask.clean && mask.there[i];
      }
      const u32 k_tile = stream.stage(tile), v_tile = k_tile + kTileBytes;
      Scores scores = {};
      multiply_keys(scores, query, k_tile);
      finish_scores(scores, p, sh, mask, k_scale);
      Weights weights;
      soften(w, scores, weights, v_scale);
      if (F::kMayBeNotFinite && !mask.clean && any_not_finite(v_tile)) {
        add_values_by_row(w, weights, v_tile, sh, mask.token);
      } else {
        add_values(w, weights, v_tile);
      }
      if constexpr (kPagedScales) k_scale = next_k, v_scale = next_v;
    }
    const int group = chunk / kGroup, group_begin = max(group * kGroup, begin);
    const int group_end = min((group + 1) * kGroup, item.chunks);
    const bool folds = group_begin == group * kGroup;
    float* to = folds ? nullptr : state_at(p, blockIdx.x, chunk - group_begin);
    finish_chunk(w, sh, item, chunk == group_begin, turn, to);
    if (chunk + 1 != min(group_end, end)) continue;
    const auto give = [&](const auto& emit) {
      for (int i = threadIdx.x; i < item.rows * kVectors; i += kThreads) {
        const int row = i / kVectors, vector = i % kVectors;
        emit(row, vector, *reinterpret_cast<const float4*>(&sh.sum[row][4 * vector]),
             sh.row[turn][row]);
      }
    };
    if (folds && chunk + 1 == group_end) {
      finish_group(p, sh, s, r, item, group, give);
      continue;
    }
    if (folds) {
      float* prefix = state_at(p, blockIdx.x, kPrefixSlot);
      give([&](int row, int vector, float4 sum, const RowState& state) {
        __stcg(reinterpret_cast<float4*>(prefix + row * kD + 4 * vector), sum);
        if (vector == 0) store_row(prefix, row, state);
      });
    }
    finish_part(p, sh, s, r, item, group, chunk + 1 - group_begin);
  }
  wait_copies<0>();
  __syncthreads();  // the next item writes what this one read
}

// Rows of nobody: behind the last request 0 and -inf; before the first one too, in a new output.
__device__ __forceinline__ void clear_rows(const Params& p) {
  const int begin = min(max(p.cu_seqlens_q[0], 0), p.T);
  const int end = min(max(p.cu_seqlens_q[p.B], begin), p.T);
  const int before = p.fresh ? begin : 0, heads = p.Hkv * p.G;
  const i64 count = i64(before + p.T - end) * heads * kVectors;
  for (i64 i = blockIdx.x * kThreads + threadIdx.x; i < count; i += i64(gridDim.x) * kThreads) {
    const int vector = i % kVectors, head = i / kVectors % heads;
    int token = int(i / kVectors / heads);
    if (token >= before) token += end - before;
    FASTKV_Q* out = p.out + token * p.out_token + head * p.out_head + 4 * vector;
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = from_float<FASTKV_Q>(0.f);
    if (p.lse != nullptr && vector == 0) p.lse[i64(token) * heads + head] = MINUS_INFINITY;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, FASTKV_BLOCKS)
    paged_attention(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) u8 memory[];
  Shared& sh = *reinterpret_cast<Shared*>(memory);
  wait_for_previous_kernel();
  let_next_kernel_start();
  clear_rows(p);
  const Share s = find_share(p, sh.scratch);
  if (s.start >= s.end) return;
  Request r = read_request(p, s.request);
  for (u32 at = s.start, base = s.request_at; at < s.end;) {
    while (at >= base + r.work) {
      base += r.work;
      r = read_request(p, r.index + 1);
    }
    const u32 local = at - base, place = local / r.chunks;
    Item item;
    item.head = place % p.Hkv;
    item.row = int(place / p.Hkv) * kRows;
    item.rows = min(r.rows - item.row, kRows);
    item.chunks = r.chunks;
    item.at = base + place * r.chunks;
    const int begin = int(local - place * r.chunks);
    const int end = int(min(u32(r.chunks), begin + (s.end - at)));
    attend(p, sh, s, r, item, begin, end);
    at += end - begin;
  }
}
