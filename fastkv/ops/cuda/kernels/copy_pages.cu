// SPDX-License-Identifier: Apache-2.0
// Copy pages of K, V and, where the format pages them, their scales.
//
// Grid: n pairs times p.parts blocks. Block: kThreads threads; each copies kUnroll vectors of 16
// bytes, all read before the first is written. No shared memory. The first part copies the scales.
//
// Shapes: cache [N, Hkv, P, D_storage], scales [N, Hkv, P], src and dst [n].
//
// Invariants: a pair with an id outside 0 .. N - 1 is dropped, and reported unless it is -1; no
// page is both read and written by two pairs (the caller's part of the contract).
#include "common/grid.cuh"
#include "common/paging.cuh"
#include "common/vectors.cuh"

constexpr int kThreads = FASTKV_THREADS;
constexpr int kUnroll = FASTKV_UNROLL;
constexpr int kRowVectors = FASTKV_ROW_BYTES / 16;  // of a token and head
static_assert(FASTKV_ROW_BYTES % 16 == 0, "rows of whole vectors");
constexpr int kScaleBytes = FASTKV_SCALE_BYTES;  // of a paged scale; 0: the format has none
constexpr int kPageShift = FASTKV_PAGE_SHIFT;

struct Params {
  char *k, *v, *k_scale, *v_scale;
  const i32 *src, *dst;
  i32* faults;
  // Constant for the metadata.
  SideStrides k_strides, v_strides;  // bytes
  i32 pages, kv_heads, parts, unused;
};
static_assert(sizeof(Params) == FASTKV_PARAMS_BYTES, "the launcher packs this struct");

__device__ __forceinline__ i32 checked(i32 id, i32 pages, Fault fault, i32 pair, i32* faults) {
  if (id >= -1 && id < pages) return id;
  report_fault(faults, fault, pair);
  return -1;
}

struct Place {
  char* tensor;
  i64 offset, page;  // within a page, and from page to page
};

// Vector i of a page: K's heads, then V's; the slots of a head, the vectors of a slot.
__device__ __forceinline__ Place vector_at(const Params& p, i32 i) {
  const i32 vector = i % kRowVectors;
  const i32 row = i / kRowVectors;
  const i32 slot = row & ((1 << kPageShift) - 1);
  const i32 head = row >> kPageShift;
  const bool is_value = head >= p.kv_heads;
  const SideStrides& strides = is_value ? p.v_strides : p.k_strides;
  const i64 offset = row_offset(strides, 0, head - (is_value ? p.kv_heads : 0), slot);
  return {is_value ? p.v : p.k, offset + 16 * vector, strides.page};
}

template <class T>
__device__ __forceinline__ void copy_scales(const Params& p, i64 from, i64 to) {
  for (i32 i = threadIdx.x; i < 2 * p.kv_heads << kPageShift; i += kThreads) {
    const i32 slot = i & ((1 << kPageShift) - 1);
    const i32 head = i >> kPageShift;
    const bool is_value = head >= p.kv_heads;
    const SideStrides& strides = is_value ? p.v_strides : p.k_strides;
    char* scales = (is_value ? p.v_scale : p.k_scale) +
                   scale_offset(strides, 0, head - (is_value ? p.kv_heads : 0), slot);
    *reinterpret_cast<T*>(scales + to * strides.scale_page) =
        *reinterpret_cast<const T*>(scales + from * strides.scale_page);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    copy_pages(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const i32 pair = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
  const i64 from = checked(p.src[pair], p.pages, kFaultSource, pair, p.faults);
  const i64 to = checked(p.dst[pair], p.pages, kFaultTarget, pair, p.faults);
  if (from < 0 || to < 0 || from == to) return;
  const i32 vectors = (2 * p.kv_heads * kRowVectors) << kPageShift;
  const i32 first = part * (kThreads * kUnroll) + threadIdx.x;
  u32 held[kUnroll][4];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const i32 i = first + u * kThreads;
    if (i >= vectors) break;
    const Place place = vector_at(p, i);
    load_words_once(place.tensor + from * place.page + place.offset, held[u]);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const i32 i = first + u * kThreads;
    if (i >= vectors) break;
    const Place place = vector_at(p, i);
    store_words(place.tensor + to * place.page + place.offset, held[u]);
  }
  if (part != 0) return;
  if constexpr (kScaleBytes == 4) copy_scales<u32>(p, from, to);
  if constexpr (kScaleBytes == 2) copy_scales<u16>(p, from, to);
}
