// SPDX-License-Identifier: Apache-2.0
// masked_attention on sm_90a: a warpgroup that copies, and two of 64 rows each that multiply.
//
// Shared memory: Q of a tile of rows, then kStages tiles of K, then as many of V, then barriers.
#pragma once
#include "masked/rows.cuh"
#include "masked/wgmma.cuh"

constexpr int kN = kWidth > 128 ? 64 : 128;  // keys of a tile
constexpr int kStages = 2;
constexpr int kThreads = 384, kBlocks = 1;  // of a block, and blocks a multiprocessor
constexpr int kFirstWriter = 128;  // those that copy have registers for no more
constexpr int kScoreTiles = kN / 8;
constexpr int kQueryBytes = kM * kWidth * 2, kTileBytes = kN * kWidth * 2;
constexpr int kPermutedBytes = 1024;  // matrices begin at multiples
static_assert(kPermutedBytes + kQueryBytes + 2 * kStages * kTileBytes + 256 <= FASTKV_SHARED_BYTES,
              "the launcher asks for less shared memory");

// Addresses in shared memory. A barrier is 8 bytes; `full` and `empty` of K's stages, then of V's.
struct Layout {
  u32 q, k, v, barriers;

  __device__ __forceinline__ explicit Layout(const void* memory) {
    q = (shared_address(memory) + kPermutedBytes - 1) & ~u32(kPermutedBytes - 1);
    k = q + kQueryBytes, v = k + kStages * kTileBytes, barriers = v + kStages * kTileBytes;
  }
  __device__ __forceinline__ u32 q_full() const { return barriers; }
  __device__ __forceinline__ u32 q_empty() const { return barriers + 8; }
  __device__ __forceinline__ u32 k_full(int stage) const { return barriers + 16 + 8 * stage; }
  __device__ __forceinline__ u32 k_empty(int stage) const { return k_full(kStages + stage); }
  __device__ __forceinline__ u32 v_full(int stage) const { return k_full(2 * kStages + stage); }
  __device__ __forceinline__ u32 v_empty(int stage) const { return k_full(3 * kStages + stage); }

  // 128 threads copy; 8 warps release.
  __device__ __forceinline__ void init() const {
    barrier_init(q_full(), 128), barrier_init(q_empty(), 8);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(k_full(i), 128), barrier_init(k_empty(i), 8);
      barrier_init(v_full(i), 128), barrier_init(v_empty(i), 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

// The tile of keys that both sides count: its stage, and the parity of the barriers' phase.
struct Turn {
  int count = 0;
  __device__ __forceinline__ int stage() const { return count % kStages; }
  __device__ __forceinline__ u32 parity() const { return count / kStages & 1; }
  __device__ __forceinline__ Turn next() const { return {count + 1}; }
};

// Rows [0, kRows) of a matrix to panels, by a warpgroup. Rows outside [low, high), and what pads D,
// arrive as zeros: there may be another request's numbers, or none.
template <int kRows>
__device__ __forceinline__ void copy_rows(u32 to, const Math* from, i64 stride, int low, int high) {
  constexpr int kPieces = kWidth / 8, kAtOnce = 128 / kPieces;
  static_assert(kAtOnce >= 4 && kRows % kAtOnce == 0, "a thread's permutation changes by one bit");
  const int piece = threadIdx.x % kPieces, first = threadIdx.x % 128 / kPieces;
  const Math* at = from + first * stride + piece * 8;
  const u32 where =
      to + piece / 8 * (kRows * 128) + first * 128 + ((piece % 8 ^ (first & 7)) << 4);
  const bool is_column = kD == kWidth || piece * 8 < kD;
  const auto place = [&](int i) {
    return (kAtOnce == 4 && i % 2 == 1 ? where ^ 64 : where) + i * (kAtOnce * 128);
  };
  if (low <= 0 && high >= kRows) {
#pragma unroll
    for (int i = 0; i < kRows / kAtOnce; ++i, at += kAtOnce * stride) {
      copy_async(place(i), is_column ? at : from, is_column ? 16 : 0);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kRows / kAtOnce; ++i, at += kAtOnce * stride) {
    const int row = first + i * kAtOnce;
    const bool there = row >= low && row < high && is_column;
    copy_async(place(i), there ? at : from, there ? 16 : 0);
  }
}

__device__ __forceinline__ void produce(const Params& p, const Layout& at) {
  Walk walk(p);
  Turn turn;
  for (int round = 0;; ++round) {
    const Work w = walk.find(tile_of(round));
    if (!w.valid) break;
    const Request& r = w.request;
    const Math* q = p.q + i64(r.first + w.row) * p.q_token + w.head * p.q_head;
    barrier_wait(at.q_empty(), round & 1 ^ 1);
    copy_rows<kM>(at.q, q, p.q_token, 0, w.rows);
    barrier_arrive_after_copies(at.q_full());
    const int kv_head = w.head / p.group;
    const Math* k = p.k + r.first_key * p.k_token + kv_head * p.k_head;
    const Math* v = p.v + r.first_key * p.v_token + kv_head * p.v_head;
    const int begin = w.low / kN, end = w.low < w.high ? (w.high + kN - 1) / kN : begin;
    for (int n = end - 1; n >= begin; --n, turn = turn.next()) {
      const int stage = turn.stage(), low = w.low - n * kN, high = min(w.high - n * kN, kN);
      barrier_wait(at.k_empty(stage), turn.parity() ^ 1);
      copy_rows<kN>(at.k + stage * kTileBytes, k + i64(n) * kN * p.k_token, p.k_token, low, high);
      barrier_arrive_after_copies(at.k_full(stage));
      barrier_wait(at.v_empty(stage), turn.parity() ^ 1);
      copy_rows<kN>(at.v + stage * kTileBytes, v + i64(n) * kN * p.v_token, p.v_token, low, high);
      barrier_arrive_after_copies(at.v_full(stage));
    }
  }
}

using Scores = float[kScoreTiles][4];
using Weights = u32[kN / 16][4];
using Out = float[kOutTiles][4];

// The two consumers begin their products in turns, so that one softens while the other multiplies.
__device__ __forceinline__ void my_turn(int consumer) {
  asm volatile("bar.sync %0, 256;" ::"r"(1 + consumer) : "memory");
}
__device__ __forceinline__ void others_turn(int consumer) {
  asm volatile("bar.arrive %0, 256;" ::"r"(2 - consumer) : "memory");
}

__device__ __forceinline__ void multiply_keys(Scores& s, u32 q_rows, u32 k_tile) {
  const u32 q = descriptor_low(q_rows), k = descriptor_low(k_tile);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    const u32 panel = step / 4, in = step % 4 * 32;
    Wgmma<Math>::qk(s, descriptor(q, panel * (kM * 128) + in), descriptor(k, panel * (kN * 128) + in),
                    step > 0);
  }
  wgmma_commit();
}

__device__ __forceinline__ void multiply_values(Out& o, const Weights& weights, u32 v_tile) {
  const u32 v = descriptor_low(v_tile, kN * 128);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kN / 16; ++step) {
    Wgmma<Math>::pv(o, weights[step], descriptor(v, step * 2048));
  }
  wgmma_commit();
}

__device__ __forceinline__ void pack(Weights& weights, const Scores& s) {
#pragma unroll
  for (int step = 0; step < kN / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&x)[4] = s[2 * step + i / 2];
      weights[step][i] = pack2<Math>(x[i % 2 * 2], x[i % 2 * 2 + 1]);
    }
  }
}

// One of the two warpgroups that multiply.
struct Consumer {
  const Params& p;
  const Layout& at;
  int index, first_row;
  Units units;
  Turn turn;

  __device__ __forceinline__ Consumer(const Params& p, const Layout& at)
      : p(p), at(at), index(__shfl_sync(~0u, int(threadIdx.x) / 128 - 1, 0)),
        first_row(64 * index + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4), units(p) {}

  __device__ __forceinline__ static void release(u32 barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
  }
  __device__ __forceinline__ void multiply_next_keys(Scores& s, const Turn& tile) const {
    multiply_keys(s, at.q + index * (64 * 128), at.k + tile.stage() * kTileBytes);
  }

  // O of a tile of rows, over its tiles of keys from the last to the first. `meanwhile` is called
  // beside the last product.
  template <class Meanwhile>
  __device__ __forceinline__ void attend(const Work& w, Rows& r, Out& o,
                                         const Meanwhile& meanwhile) {
    const int begin = w.low / kN;
    int n = (w.high + kN - 1) / kN - 1;
    Scores s;
    Weights weights;
    float shrink[2];
    wait_for_tile(at.k_full(turn.stage()), turn.parity());
    multiply_next_keys(s, turn);
    wgmma_wait<0>();
    release(at.k_empty(turn.stage()));
    bool same = soften(s, r, shrink, units, n * kN, w.is_clean(n * kN, kN));
    bool first = true;
    // S of a tile is multiplied beside O of the one before it. The wait for O opens the loop's body,
    // behind a jump: within one block of code the compiler would put it in front of the softmax.
    const auto fold = [&] {
      wgmma_wait<0>();
      if (!first) release(at.v_empty((turn.count - 1) % kStages));
      first = false;
      if (!same) scale_rows(o, shrink);
      pack(weights, s);
    };
#pragma unroll 1
    for (--n; n >= begin; --n, turn = turn.next()) {
      fold();
      const Turn next = turn.next();
      wait_for_tile(at.k_full(next.stage()), next.parity());
      my_turn(index);
      multiply_next_keys(s, next);
      wait_for_tile(at.v_full(turn.stage()), turn.parity());
      multiply_values(o, weights, at.v + turn.stage() * kTileBytes);
      others_turn(index);
      wgmma_wait<1>();
      release(at.k_empty(next.stage()));
      same = soften(s, r, shrink, units, n * kN, w.is_clean(n * kN, kN));
    }
    release(at.q_empty());  // the next tile's rows may come
    fold();
    wait_for_tile(at.v_full(turn.stage()), turn.parity());
    multiply_values(o, weights, at.v + turn.stage() * kTileBytes);
    meanwhile();
    wgmma_wait<0>();
    release(at.v_empty(turn.stage()));
    turn = turn.next();
  }

  __device__ __forceinline__ void run() {
    Walk walk(p);
    if (index == 1) others_turn(index);
    Work w = walk.find(tile_of(0));
    for (int round = 0; w.valid; ++round) {
      Work next;
      const auto find_next = [&] { next = walk.find(tile_of(round + 1)); };
      Rows r(p, w, first_row);
      Out o;
#pragma unroll
      for (int i = 0; i < 4 * kOutTiles; ++i) o[i / 4][i % 4] = 0.f;
      barrier_wait(at.q_full(), round & 1);
      if (w.low < w.high) {
        attend(w, r, o, find_next);
      } else {
        release(at.q_empty());
        find_next();
      }
      write_rows(p, w, r, o, first_row);
      w = next;
    }
  }
};

__device__ __forceinline__ void attend_all(const Params& p, const void* memory) {
  const Layout at(memory);
  if (threadIdx.x == 0) at.init();
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    produce(p, at);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Consumer(p, at).run();
  }
}
