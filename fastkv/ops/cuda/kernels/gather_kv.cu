// SPDX-License-Identifier: Apache-2.0
// Dequantize each request's cached tokens into contiguous K and V.
//
// Grid: blocks of kWarps rows of out_k and out_v, ceil(Tk / kWarps) in all. Block: kWarps warps, one
// a row. No shared memory. A lane takes eight neighbouring elements of a head at a time, and kUnroll
// such loads are under way before the first is used: 16-byte stores, and loads of what eight
// elements take in the format.
//
// Shapes: cache [N, Hkv, P, D], scales [N, Hkv, P], block_table [B, M], out_k, out_v [Tk, Hkv, D].
//
// Invariants: a row behind a request's cached tokens, or of no request, is left alone; a token
// without a page gives zeros; arithmetic is the codec's, in float32, then one rounding.
#include "common/grid.cuh"
#include "common/paging.cuh"
#include "common/vectors.cuh"
#include FASTKV_CODEC_HEADER

using Out = FASTKV_OUT;

constexpr int kHeadDim = FASTKV_HEAD_DIM;
constexpr int kWarps = FASTKV_WARPS;
constexpr int kUnroll = FASTKV_UNROLL;
constexpr int kChunks = kHeadDim / 8;  // of a head
static_assert(kHeadDim % 8 == 0, "chunks of eight elements");
constexpr int kWords = Codec::kBits / 4;  // of a chunk in the cache

struct Params {
  // Aligned to 16 bytes.
  const char *cache_k, *cache_v;
  Out *out_k, *out_v;
  StaticPointers dequant;
  // Aligned to their elements.
  const char *scale_k, *scale_v;
  const i32 *cache_seqlens, *block_table, *cu_seqlens_k;
  i32* faults;
  // Constant for the metadata.
  SideStrides k_strides, v_strides;  // bytes
  i64 out_k_row, out_k_head, out_v_row, out_v_head;  // elements
  TableShape table;
  i32 rows, kv_heads;
};
static_assert(sizeof(Params) == FASTKV_PARAMS_BYTES, "the launcher packs this struct");

// Where a chunk comes from, and what it is multiplied by.
struct Chunk {
  bool is_value;
  i32 head, element;
};

__device__ __forceinline__ Chunk chunk_at(const Params& p, i32 i) {
  const i32 of_side = p.kv_heads * kChunks;
  const bool is_value = i >= of_side;
  if (is_value) i -= of_side;
  return {is_value, i / kChunks, i % kChunks * 8};
}

__device__ __forceinline__ Multipliers multipliers(const Params& p, const Chunk& chunk, i32 page,
                                                   i32 slot) {
#if defined(FASTKV_STATIC)
  using Static = FASTKV_STATIC;
  const void* scale = chunk.is_value ? p.dequant.v : p.dequant.k;
  const void* zp = chunk.is_value ? p.dequant.v_zp : p.dequant.k_zp;
  return static_multipliers<Static, FASTKV_PER_CHANNEL, Codec::kZeroPoint, kHeadDim>(
      static_cast<const Static*>(scale), static_cast<const Static*>(zp), chunk.head, chunk.element);
#elif defined(FASTKV_SCALE)
  const char* scales = chunk.is_value ? p.scale_v : p.scale_k;
  const SideStrides& strides = chunk.is_value ? p.v_strides : p.k_strides;
  scales += scale_offset(strides, page, chunk.head, slot);
  return same_multiplier(to_float(*reinterpret_cast<const FASTKV_SCALE*>(scales)));
#else
  return same_multiplier(1.0f);
#endif
}

__device__ __forceinline__ void load_chunk(const Params& p, const Chunk& chunk, i32 page, i32 slot,
                                           u32 (&stored)[kWords]) {
  const SideStrides& strides = chunk.is_value ? p.v_strides : p.k_strides;
  const char* row = (chunk.is_value ? p.cache_v : p.cache_k) +
                    row_offset(strides, page, chunk.head, slot);
  load_words_once(row + chunk.element / 8 * Codec::kBits, stored);
}

__device__ __forceinline__ void store_chunk(const Params& p, i32 row, const Chunk& chunk,
                                            const float (&x)[8]) {
  const i64 at = chunk.is_value ? row * p.out_v_row + chunk.head * p.out_v_head
                                : row * p.out_k_row + chunk.head * p.out_k_head;
  store8((chunk.is_value ? p.out_v : p.out_k) + at + chunk.element, x);
}

__device__ __forceinline__ void store_zeros(const Params& p, i32 row) {
  const float zeros[8] = {};
  for (i32 i = threadIdx.x % 32; i < 2 * p.kv_heads * kChunks; i += 32) {
    store_chunk(p, row, chunk_at(p, i), zeros);
  }
}

__device__ __forceinline__ void gather_row(const Params& p, i32 row, i32 page, i32 slot) {
  const i32 chunks = 2 * p.kv_heads * kChunks;
  for (i32 base = threadIdx.x % 32; base < chunks; base += 32 * kUnroll) {
    u32 stored[kUnroll][kWords];
    Multipliers m[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const i32 i = base + 32 * u;
      if (i < chunks) load_chunk(p, chunk_at(p, i), page, slot, stored[u]);
    }
#if defined(FASTKV_SCALE)  // as far away as the chunks themselves
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const i32 i = base + 32 * u;
      if (i < chunks) m[u] = multipliers(p, chunk_at(p, i), page, slot);
    }
#endif
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const i32 i = base + 32 * u;
      if (i >= chunks) break;
      const Chunk chunk = chunk_at(p, i);
#if !defined(FASTKV_SCALE)
      m[u] = multipliers(p, chunk, page, slot);
#endif
      float x[8];
      Codec::decode(stored[u], m[u], x);
      store_chunk(p, row, chunk, x);
    }
  }
}

extern "C" __global__ void __launch_bounds__(32 * kWarps, 1024 / (32 * kWarps))
    gather_kv(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const i32 row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const i32 b = last_at_most(p.cu_seqlens_k, p.table.requests + 1, row);
  if (b < 0 || b >= p.table.requests) return;
  const i32 position = row - p.cu_seqlens_k[b];
  const i32 cached = p.cache_seqlens[b];
  const i64 rows = i64(p.cu_seqlens_k[b + 1]) - p.cu_seqlens_k[b];
  if (cached > capacity(p.table) || cached < 0) report_fault(p.faults, kFaultLength, b);
  if (cached > rows) report_fault(p.faults, kFaultSegment, b);
  if (position < 0 || position >= cached || position >= capacity(p.table)) return;
  const i32 id = page_id(p.block_table, p.table, b, position);
  const i32 page = checked_page(id, p.table, b, p.faults);
  if (page < 0) {
    store_zeros(p, row);
  } else {
    gather_row(p, row, page, slot_at(p.table, position));
  }
}
