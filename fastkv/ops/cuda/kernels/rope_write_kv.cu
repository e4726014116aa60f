// SPDX-License-Identifier: Apache-2.0
// Split qkv, norm, rotate, quantize and write the new tokens; return q.
//
// Grid: T blocks, one a row of qkv. Block: FASTKV_THREADS, a few warps. Shared memory: static, one
// scratch row for each row of a warp, only with norm or with a partial NeoX rotation.
//
// A row here is one head of a token, D elements over D/16 lanes (common/row_fold.cuh); a warp takes
// 32 / (D/16) heads at a time, and kUnroll times that many 16-byte loads are under way before the
// first is used. Cosines and sines stay in registers from head to head.
//
// Shapes: qkv [T, (Hq + 2*Hkv) * D], q [T, Hq, D], cache [N, Hkv, P, D], scales [N, Hkv, P],
// block_table [B, M], cos and sin [max_len, rotary_dim/2], k, v [T, Hkv, D], out_k, out_v
// [Tk, Hkv, D].
//
// Invariants: a token's cache bytes are written by the block of its row alone; a row outside
// cu_seqlens_q gets zeros and writes no cache; a position without a page, or past the table,
// writes no cache. Every float32 operation is rounded by itself, in the reference's order.
#include "common/grid.cuh"
#include "common/paging.cuh"
#include "common/row_fold.cuh"
#include "common/vectors.cuh"
#include FASTKV_CODEC_HEADER

using Qkv = FASTKV_QKV;
using QWeight = FASTKV_Q_WEIGHT;
using KWeight = FASTKV_K_WEIGHT;
#if FASTKV_HAS_OUT
using Out = FASTKV_OUT;
#endif

constexpr int kHeadDim = FASTKV_HEAD_DIM;
constexpr int kThreads = FASTKV_THREADS;
constexpr int kUnroll = FASTKV_UNROLL;
constexpr int kRotaryDim = FASTKV_ROTARY_DIM;  // 0: no rotation
constexpr bool kInterleaved = FASTKV_INTERLEAVED;
constexpr int kNorm = FASTKV_NORM;             // 0: none, 1: before the rotation, 2: after it
constexpr bool kReturnKv = FASTKV_RETURN_KV;
constexpr bool kHasOut = FASTKV_HAS_OUT;

using Layout = RowLayout<kHeadDim>;
constexpr int kAngles = kRotaryDim / 2;
constexpr bool kFullNeox = !kInterleaved && kRotaryDim == kHeadDim;
constexpr bool kPartialNeox = !kInterleaved && kRotaryDim > 0 && !kFullNeox;
// Angles of a lane's pairs in registers, in aligned groups of four.
constexpr bool kKeepAngles = kFullNeox || (kInterleaved && kRotaryDim > 0 && kAngles % 4 == 0);
constexpr int kPitch = kPartialNeox ? kHeadDim + 4 : Layout::kFoldPitch;
constexpr bool kNeedsScratch = kNorm != 0 || kPartialNeox;
constexpr int kWarps = kThreads / 32;
constexpr int kStride = kWarps * Layout::kRows;  // heads from a warp's row to its next
constexpr int kScratchRows = (32 + Layout::kLanes - 1) / Layout::kLanes;  // spare lanes too
constexpr int kRowWords = kWordsOf8<Qkv>;

struct Params {
  // Aligned to 16 bytes.
  const void* qkv;
  Qkv* q;
  char *cache_k, *cache_v;
  const float *cos, *sin;
  const QWeight* q_weight;
  const KWeight* k_weight;
  StaticPointers quant;
  Qkv *k, *v;
  void *out_k, *out_v;
  // Aligned to their elements.
  char *scale_k, *scale_v;
  const i32 *cu_seqlens_q, *cache_seqlens, *block_table, *cu_seqlens_k;
  i32* faults;
  // Constant for the metadata; strides of rows in elements.
  i64 qkv_row, cos_row, sin_row;
  SideStrides k_strides, v_strides;
  i64 out_k_row, out_k_head, out_v_row, out_v_head;
  TableShape table;
  i32 rows, query_heads, kv_heads, max_len, out_rows;
  float eps;
};
static_assert(sizeof(Params) == FASTKV_PARAMS_BYTES, "the launcher packs this struct");

// One token, the same in all lanes of the block.
struct Token {
  i32 request;   // -1: a row of nobody
  i32 position;  // within the rope tables
  i32 page;      // as the block table has it, not yet checked; -1: not written
  i32 slot;
  i64 out_row;   // -1: not written to out_k and out_v
};

__device__ __forceinline__ Token find_token(const Params& p, i32 row) {
  const i32 b = last_at_most(p.cu_seqlens_q, p.table.requests + 1, row);
  Token token{-1, 0, -1, 0, -1};
  if (b < 0 || b >= p.table.requests) return token;
  token.request = b;
  const i64 cached = p.cache_seqlens[b];
  const i64 position = cached + (row - p.cu_seqlens_q[b]);
  if (cached < 0 || position < 0 || position >= capacity(p.table)) {
    report_fault(p.faults, kFaultLength, b);
    token.position = position < 0 ? 0 : i32(min(position, i64(p.max_len) - 1));
    return token;
  }
  token.page = page_id(p.block_table, p.table, b, i32(position));
  token.slot = slot_at(p.table, i32(position));
  token.position = i32(position);
  if constexpr (kRotaryDim > 0) {
    if (position >= p.max_len) {
      report_fault(p.faults, kFaultPosition, b);
      token.position = p.max_len - 1;
    }
  }
  if constexpr (kHasOut) {
    const i64 first = p.cu_seqlens_k[b], last = p.cu_seqlens_k[b + 1];
    if (first == last) return token;  // takes no part
    const i64 target = first + position;
    if (first < 0 || target >= last || last > p.out_rows) {
      report_fault(p.faults, kFaultSegment, b);
    } else {
      token.out_row = target;
    }
  }
  return token;
}

// A lane's sixteen elements of a head's row, as two chunks.
struct Chunks {
  float low[8], high[8];
};

struct Angles {
  float cos[8], sin[8];
};

__device__ __forceinline__ void rotate_pair(float& one, float& two, float cos, float sin) {
  const float x = one, y = two;
  one = __fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));
  two = __fadd_rn(__fmul_rn(y, cos), __fmul_rn(x, sin));
}

__device__ __forceinline__ void load4(const float* from, float* to) {
  u32 w[4];
  load_words(from, w);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(w[i]);
}

// First angles of a lane's low and high chunk.
__device__ __forceinline__ int low_angle(int part) { return kInterleaved ? 4 * part : 8 * part; }
__device__ __forceinline__ int high_angle(int part) {
  return kInterleaved ? kHeadDim / 4 + 4 * part : 8 * part + 4;
}

__device__ __forceinline__ void load_angles(const Params& p, i32 position, int part, Angles& a) {
  const float* cos = p.cos + position * p.cos_row;
  const float* sin = p.sin + position * p.sin_row;
#pragma unroll
  for (int i = 0; i < 8; ++i) a.cos[i] = a.sin[i] = 0.0f;
  if (low_angle(part) < kAngles) {
    load4(cos + low_angle(part), a.cos);
    load4(sin + low_angle(part), a.sin);
  }
  if (high_angle(part) < kAngles) {
    load4(cos + high_angle(part), a.cos + 4);
    load4(sin + high_angle(part), a.sin + 4);
  }
}

__device__ __forceinline__ void rotate_interleaved(const Params& p, const Angles& a, i32 position,
                                                   int part, Chunks& x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int low = low_angle(part) + i, high = high_angle(part) + i;
    if constexpr (kKeepAngles) {
      if (low < kAngles) rotate_pair(x.low[2 * i], x.low[2 * i + 1], a.cos[i], a.sin[i]);
      if (high < kAngles) rotate_pair(x.high[2 * i], x.high[2 * i + 1], a.cos[4 + i], a.sin[4 + i]);
    } else {
      const float* cos = p.cos + position * p.cos_row;
      const float* sin = p.sin + position * p.sin_row;
      if (low < kAngles) rotate_pair(x.low[2 * i], x.low[2 * i + 1], cos[low], sin[low]);
      if (high < kAngles) rotate_pair(x.high[2 * i], x.high[2 * i + 1], cos[high], sin[high]);
    }
  }
}

// Pairs (i, i + rotary_dim/2) lie in different lanes: each looks its partner up in the row.
__device__ __forceinline__ void rotate_partial(const Params& p, float* scratch, i32 position,
                                               int part, Chunks& x) {
  const float* cos = p.cos + position * p.cos_row;
  const float* sin = p.sin + position * p.sin_row;
  __syncwarp();  // the row before this one was read
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    scratch[8 * part + i] = x.low[i];
    scratch[Layout::kHalf + 8 * part + i] = x.high[i];
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int element = (i < 8 ? 0 : Layout::kHalf - 8) + 8 * part + i;
    float& own = i < 8 ? x.low[i % 8] : x.high[i % 8];
    if (element < kAngles) {
      float other = scratch[element + kAngles];
      rotate_pair(own, other, cos[element], sin[element]);
    } else if (element < kRotaryDim) {
      float other = scratch[element - kAngles];
      rotate_pair(other, own, cos[element - kAngles], sin[element - kAngles]);
    }
  }
}

template <class T>
__device__ __forceinline__ void scale_by_weight(const T* weight, float root, int part, Chunks& x) {
  float w[8];
  load8(weight + 8 * part, w);
#pragma unroll
  for (int i = 0; i < 8; ++i) x.low[i] = __fmul_rn(__fdiv_rn(x.low[i], root), w[i]);
  load8(weight + Layout::kHalf + 8 * part, w);
#pragma unroll
  for (int i = 0; i < 8; ++i) x.high[i] = __fmul_rn(__fdiv_rn(x.high[i], root), w[i]);
}

enum Kind { kQuery, kKey, kValue };

__device__ __forceinline__ void norm(const Params& p, Kind kind, float* scratch, int part,
                                     int row_lane, Chunks& x) {
  const bool is_normed = (kind == kQuery && p.q_weight != nullptr) ||
                         (kind == kKey && p.k_weight != nullptr);
  if (!__any_sync(kAllLanes, is_normed)) return;
  const float sum = sum_of_squares<kHeadDim>(x.low, x.high, scratch, part, row_lane);
  const float root = __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, float(kHeadDim)), p.eps));
  if (!is_normed) return;
  if (kind == kQuery) {
    scale_by_weight(p.q_weight, root, part, x);
  } else {
    scale_by_weight(p.k_weight, root, part, x);
  }
}

template <class T>
__device__ __forceinline__ void store_row(T* to, const Chunks& x, int part) {
  store8(to + 8 * part, x.low);
  store8(to + Layout::kHalf + 8 * part, x.high);
}

#if FASTKV_HAS_OUT
__device__ __forceinline__ void store_out(const Params& p, const Token& token, bool is_key,
                                          i32 head, const Chunks& x, int part) {
  if (token.out_row < 0) return;
  if (is_key) {
    Out* to = static_cast<Out*>(p.out_k) + token.out_row * p.out_k_row + head * p.out_k_head;
    store_row(to, x, part);
  } else {
    Out* to = static_cast<Out*>(p.out_v) + token.out_row * p.out_v_row + head * p.out_v_head;
    store_row(to, x, part);
  }
}
#endif

// Multipliers of the chunk that begins at `element`; `row_scale` where they are paged.
__device__ __forceinline__ Multipliers multipliers(const Params& p, bool is_key, i32 head,
                                                   int element, float row_scale) {
#if defined(FASTKV_STATIC)
  using Static = FASTKV_STATIC;
  const void* scale = is_key ? p.quant.k : p.quant.v;
  const void* zp = is_key ? p.quant.k_zp : p.quant.v_zp;
  return static_multipliers<Static, FASTKV_PER_CHANNEL, Codec::kZeroPoint, kHeadDim>(
      static_cast<const Static*>(scale), static_cast<const Static*>(zp), head, element);
#else
  return same_multiplier(row_scale);
#endif
}

__device__ __forceinline__ float largest_magnitude(const Chunks& x, int row_lane) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    amax = MaxOrNan::of(amax, MaxOrNan::of(fabsf(x.low[i]), fabsf(x.high[i])));
  }
  return fold_lanes<MaxOrNan, Layout::kLanes>(amax, row_lane);
}

__device__ __forceinline__ void store_quantized(const Params& p, i32 page, i32 slot, bool is_key,
                                                i32 head, float row_scale, int part,
                                                const Chunks& x) {
  const SideStrides& strides = is_key ? p.k_strides : p.v_strides;
  char* row = (is_key ? p.cache_k : p.cache_v) + row_offset(strides, page, head, slot);
  u32 stored[Codec::kBits / 4];
  Codec::encode(x.low, multipliers(p, is_key, head, 8 * part, row_scale), stored);
  store_words(row + part * Codec::kBits, stored);
  const int high = Layout::kHalf + 8 * part;
  Codec::encode(x.high, multipliers(p, is_key, head, high, row_scale), stored);
  store_words(row + high / 8 * Codec::kBits, stored);
#if defined(FASTKV_SCALE)
  if (part == 0) {
    using Scale = FASTKV_SCALE;
    char* scales = is_key ? p.scale_k : p.scale_v;
    *reinterpret_cast<Scale*>(scales + scale_offset(strides, page, head, slot)) =
        from_float<Scale>(row_scale);
  }
#endif
}

// Norm and rotation of the heads that a warp holds; values stay as they are. For whole warps.
__device__ __forceinline__ void norm_and_rotate(const Params& p, Kind kind, const Angles& angles,
                                                i32 position, float* scratch, int part,
                                                int row_lane, Chunks& x) {
  if constexpr (kNorm == 1) norm(p, kind, scratch, part, row_lane, x);
  if constexpr (kPartialNeox) {
    Chunks rotated = x;
    rotate_partial(p, scratch, position, part, rotated);
    if (kind != kValue) x = rotated;
  } else if constexpr (kFullNeox) {
    if (kind != kValue) {
#pragma unroll
      for (int i = 0; i < 8; ++i) rotate_pair(x.low[i], x.high[i], angles.cos[i], angles.sin[i]);
    }
  } else if constexpr (kRotaryDim > 0) {
    if (kind != kValue) rotate_interleaved(p, angles, position, part, x);
  }
  if constexpr (kNorm == 2) norm(p, kind, scratch, part, row_lane, x);
}

// Everything that K and V go to. For whole warps; only lanes with `is_kv` hold a K or V head.
__device__ __forceinline__ void store_kv(const Params& p, const Token& token, i32 row, bool is_kv,
                                         bool is_key, i32 head, int part, int row_lane,
                                         const Chunks& x) {
  float row_scale = 0.0f;
#if defined(FASTKV_SCALE)
  row_scale = Codec::row_scale<FASTKV_SCALE>(largest_magnitude(x, row_lane));
#endif
  if (!is_kv) return;
  if constexpr (kReturnKv) {
    store_row((is_key ? p.k : p.v) + (i64(row) * p.kv_heads + head) * kHeadDim, x, part);
  }
#if FASTKV_HAS_OUT
  store_out(p, token, is_key, head, x, part);
#endif
  const i32 page = checked_page(token.page, p.table, token.request, p.faults);
  if (page >= 0) store_quantized(p, page, token.slot, is_key, head, row_scale, part, x);
}

extern "C" __global__ void __launch_bounds__(kThreads, FASTKV_RESIDENT / kThreads)
    rope_write_kv(const __grid_constant__ Params p) {
  __shared__ float4 scratch_of_block[kNeedsScratch ? kWarps * kScratchRows * kPitch / 4 : 1];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_of_warp = lane / Layout::kLanes;
  const int part = lane % Layout::kLanes, row_lane = lane - part;
  // Lanes past the last whole row follow along and store nothing.
  const bool is_spare = row_of_warp >= Layout::kRows;
  float* scratch =
      reinterpret_cast<float*>(scratch_of_block) + (warp * kScratchRows + row_of_warp) * kPitch;
  const i32 row = blockIdx.x;
  const Qkv* qkv = static_cast<const Qkv*>(p.qkv) + row * p.qkv_row;
  const i32 heads = p.query_heads + 2 * p.kv_heads;

  for (i32 base = warp * Layout::kRows; base < heads; base += kStride * kUnroll) {
    u32 raw[kUnroll][2][kRowWords] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const i32 head = base + u * kStride + row_of_warp;
      if (head < heads && !is_spare) {
        const Qkv* from = qkv + head * kHeadDim + 8 * part;
        load_words_once(from, raw[u][0]);
        load_words_once(from + Layout::kHalf, raw[u][1]);
      }
    }
    const Token token = find_token(p, row);
    Angles angles;
    if constexpr (kKeepAngles) load_angles(p, token.position, part, angles);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const i32 head = base + u * kStride + row_of_warp;
      const bool is_head = head < heads && !is_spare;
      const i32 kv_head = head - p.query_heads;  // of K, then of V
      const Kind kind = kv_head < 0 ? kQuery : kv_head < p.kv_heads ? kKey : kValue;
      Chunks x = {};
      if (token.request >= 0) {
        unpack8<Qkv>(raw[u][0], x.low);
        unpack8<Qkv>(raw[u][1], x.high);
        norm_and_rotate(p, kind, angles, token.position, scratch, part, row_lane, x);
      }
      if (is_head && kind == kQuery) {
        store_row(p.q + (i64(row) * p.query_heads + head) * kHeadDim, x, part);
      }
      const bool is_kv = is_head && kind != kQuery;
      if (__any_sync(kAllLanes, is_kv)) {
        const bool is_key = kind == kKey;
        store_kv(p, token, row, is_kv, is_key, kv_head - (is_key ? 0 : p.kv_heads), part, row_lane,
                 x);
      }
    }
  }
}
