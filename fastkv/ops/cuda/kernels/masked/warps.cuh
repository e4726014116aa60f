// SPDX-License-Identifier: Apache-2.0
// masked_attention by mma.sync, from sm_80 on: warps of 32 rows, or 16 where D is large, which copy
// and multiply.
//
// Shared memory: Q of a tile of rows, one tile of K, one of V; K of a tile is on its way while V of
// the one before it is multiplied, and the other way round.
#pragma once
#include "masked/rows.cuh"

constexpr int kN = kWidth > 128 ? 32 : 64;  // keys of a tile
constexpr int kHalves = kWidth > 128 ? 1 : 2;  // of a warp's rows, 16 each: K and V are read once for all
constexpr int kThreads = kM / (16 * kHalves) * 32;
constexpr int kBlocks = kWidth > 128 ? 1 : 2;  // a multiprocessor
constexpr int kFirstWriter = 0;
constexpr int kScoreTiles = kN / 8;
constexpr int kPitch = 2 * kWidth;  // bytes of a row, its 16-byte pieces XORed with the row modulo 8
constexpr int kQueryBytes = kM * kPitch, kTileBytes = kN * kPitch;
static_assert(kQueryBytes + 2 * kTileBytes <= FASTKV_SHARED_BYTES,
              "the launcher asks for less shared memory");

// Rows of a matrix to shared memory, by the block; those outside [low, high), and what pads D, arrive
// as zeros: there may be another request's numbers, or none.
template <int kRows>
__device__ __forceinline__ void copy_rows(u32 to, const Math* from, i64 stride, int low, int high) {
  constexpr int kPieces = kWidth / 8, kAtOnce = kThreads / kPieces;
  const int piece = threadIdx.x % kPieces, first = threadIdx.x / kPieces;
  const Math* at = from + first * stride + piece * 8;
#pragma unroll 4
  for (int i = 0; i < kRows / kAtOnce; ++i, at += kAtOnce * stride) {
    const int row = first + i * kAtOnce;
    const bool there = row >= low && row < high && piece * 8 < kD;
    copy_async(to + row * kPitch + ((piece ^ (row & 7)) << 4), there ? at : from, there ? 16 : 0);
  }
  commit_copies();
}

// Where ldmatrix begins: piece 0 or 1 of a row. 2 * step pieces further, as in shared.cuh of the paged
// kernel, the permutation splits; so it does for rows that are a multiple of 8 apart.
__device__ __forceinline__ u32 place(u32 tile, int row, int piece) {
  return tile + row * kPitch + ((piece ^ (row & 7)) << 4);
}

using Scores = float[kHalves][kScoreTiles][4];
using Out = float[kHalves][kOutTiles][4];

__device__ __forceinline__ void multiply_keys(Scores& s, u32 q, u32 k_tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 a_at = place(q, 16 * kHalves * warp + (lane & 15), lane / 16);
  const u32 b_at = place(k_tile, (lane & 7) + (lane & 16) / 2, (lane & 8) / 8);
#pragma unroll
  for (int i = 0; i < kHalves * kScoreTiles * 4; ++i) {
    s[i / (4 * kScoreTiles)][i / 4 % kScoreTiles][i % 4] = 0.f;
  }
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    u32 a[kHalves][4];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) load_matrices(a[h], (a_at ^ 32 * step) + h * (16 * kPitch));
#pragma unroll
    for (int j = 0; j < kScoreTiles; j += 2) {
      u32 b[4];  // 8 keys and their next 8 of D; the next 8 keys the same
      load_matrices(b, (b_at ^ 32 * step) + j * (8 * kPitch));
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        mma<Math>(s[h][j], a[h], b[0], b[1]);
        mma<Math>(s[h][j + 1], a[h], b[2], b[3]);
      }
    }
  }
}

__device__ __forceinline__ void multiply_values(Out& o, const Scores& s, u32 v_tile) {
  const int lane = threadIdx.x % 32;
  const u32 b_at = place(v_tile, lane & 15, lane / 16);
#pragma unroll
  for (int step = 0; step < kN / 16; ++step) {
    u32 a[kHalves][4];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&x)[4] = s[h][2 * step + i / 2];
        a[h][i] = pack2<Math>(x[i % 2 * 2], x[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int d = 0; d < kOutTiles; d += 2) {
      u32 b[4];  // 8 of D: keys 0-7, 8-15; the next 8 of D the same
      load_matrices_transposed(b, (b_at ^ 16 * d) + step * (16 * kPitch));
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        mma<Math>(o[h][d], a[h], b[0], b[1]);
        mma<Math>(o[h][d + 1], a[h], b[2], b[3]);
      }
    }
  }
}

// One tile of rows.
struct Block {
  const Params& p;
  const Work& w;
  u32 q, k, v;  // in shared memory
  const Math *keys, *values;

  __device__ __forceinline__ Block(const Params& p, const Work& w, const void* memory)
      : p(p), w(w), q(shared_address(memory)), k(q + kQueryBytes), v(k + kTileBytes),
        keys(p.k + w.request.first_key * p.k_token + w.head / p.group * p.k_head),
        values(p.v + w.request.first_key * p.v_token + w.head / p.group * p.v_head) {}

  __device__ __forceinline__ void copy_query() const {
    const Math* rows = p.q + i64(w.request.first + w.row) * p.q_token + w.head * p.q_head;
    copy_rows<kM>(q, rows, p.q_token, 0, w.rows);
  }
  __device__ __forceinline__ void copy_tile(u32 to, const Math* from, i64 stride, int n) const {
    copy_rows<kN>(to, from + i64(n) * kN * stride, stride, w.low - n * kN, min(w.high - n * kN, kN));
  }

  __device__ __forceinline__ void run() const {
    const int begin = w.low / kN, end = w.low < w.high ? (w.high + kN - 1) / kN : begin;
    const int first = threadIdx.x / 32 * (16 * kHalves) + threadIdx.x % 32 / 4;
    const Units units(p);
    copy_query();
    if (begin < end) copy_tile(k, keys, p.k_token, end - 1);
    Rows r[kHalves];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) r[h] = Rows(p, w, first + 16 * h);
    Out o;
#pragma unroll
    for (int i = 0; i < kHalves * kOutTiles * 4; ++i) {
      o[i / (4 * kOutTiles)][i / 4 % kOutTiles][i % 4] = 0.f;
    }
    for (int n = end - 1; n >= begin; --n) {
      wait_copies<0>();
      __syncthreads();  // K is there for all, and V's place is free
      copy_tile(v, values, p.v_token, n);
      Scores s;
      multiply_keys(s, q, k);
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        float shrink[2];
        const bool same = soften(s[h], r[h], shrink, units, n * kN, w.is_clean(n * kN, kN));
        if (!same) scale_rows(o[h], shrink);
      }
      wait_copies<0>();
      __syncthreads();  // V is there, and K's place is free
      if (n > begin) copy_tile(k, keys, p.k_token, n - 1);
      multiply_values(o, s, v);
    }
    wait_copies<0>();
    __syncthreads();  // the next tile's rows take Q's place
#pragma unroll
    for (int h = 0; h < kHalves; ++h) write_rows(p, w, r[h], o[h], first + 16 * h);
  }
};

__device__ __forceinline__ void attend_all(const Params& p, const void* memory) {
  Walk walk(p);
  for (int round = 0;; ++round) {
    const Work w = walk.find(tile_of(round));
    if (!w.valid) break;
    Block(p, w, memory).run();
  }
}
