// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory and products of a warpgroup (wgmma), both of sm_90a.
//
// Matrices in shared memory are panels of 64 columns: rows of 128 bytes whose 16-byte pieces are
// XORed with the row modulo 8, which is the instruction's 128-byte permutation.
#pragma once
#include "common/tensor_core.cuh"

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives once all that this thread has copied so far is there.
__device__ __forceinline__ void barrier_arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE_%=;\nbra WAIT_%=;\nDONE_%=:\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}
// Waits for what other threads copied (the generic proxy), for wgmma (the async proxy) to read it.
__device__ __forceinline__ void wait_for_tile(u32 barrier, u32 parity) {
  barrier_wait(barrier, parity);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The low word of a matrix's descriptor; `bytes` along it may be added later. With the instruction's
// N across panels, `panel` is their distance. The same for a warp's lanes, and known to be.
__device__ __forceinline__ u32 descriptor_low(u32 address, u32 panel = 16) {
  return __shfl_sync(~0u, address >> 4 | panel >> 4 << 16, 0);
}
// Groups of 8 rows are 1024 bytes apart; bit 62 names the permutation.
__device__ __forceinline__ u64 descriptor(u32 low, u32 bytes) {
  return u64(low + (bytes >> 4)) | u64(1024 >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// A thread's part of a 64 x N product: N / 8 tiles as in rows.cuh.
#define FASTKV_4(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define FASTKV_16(d, j) FASTKV_4(d, j), FASTKV_4(d, j + 1), FASTKV_4(d, j + 2), FASTKV_4(d, j + 3)
#define FASTKV_32(d, j) FASTKV_16(d, j), FASTKV_16(d, j + 4)
#define FASTKV_64(d, j) FASTKV_32(d, j), FASTKV_32(d, j + 8)
#define FASTKV_128(d, j) FASTKV_64(d, j), FASTKV_64(d, j + 16)
#define FASTKV_NAMES_32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31"
#define FASTKV_NAMES_64                                                                           \
  FASTKV_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50," \
  "%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FASTKV_NAMES_128                                                                          \
  FASTKV_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82," \
  "%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104," \
  "%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,"    \
  "%123,%124,%125,%126,%127"

// S (+)= Q K^T, both in shared memory, over 16 of D; `add` is 0 for the first.
#define FASTKV_MULTIPLY_QK(N, TILES, TYPES, A, B, ADD)                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                   \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES                            \
               " {" FASTKV_NAMES_##TILES "}, " A ", " B ", p, 1, 1, 0, 0;\n}"                     \
               : FASTKV_##TILES(d, 0)                                                             \
               : "l"(a), "l"(b), "r"(add))
// O += P V: P in registers, V's rows along the reduction (transposed).
#define FASTKV_MULTIPLY_PV(N, TILES, TYPES, A, B)                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES                  \
               " {" FASTKV_NAMES_##TILES "}, {" A "}, " B ", 1, 1, 1, 1;"               \
               : FASTKV_##TILES(d, 0)                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <class Math> struct Wgmma;

#define FASTKV_WGMMA(MATH, TYPES)                                                               \
  template <> struct Wgmma<MATH> {                                                              \
    static __device__ __forceinline__ void qk(float (&d)[16][4], u64 a, u64 b, int add) {       \
      FASTKV_MULTIPLY_QK(128, 64, TYPES, "%64", "%65", "%66");                                  \
    }                                                                                           \
    static __device__ __forceinline__ void qk(float (&d)[8][4], u64 a, u64 b, int add) {        \
      FASTKV_MULTIPLY_QK(64, 32, TYPES, "%32", "%33", "%34");                                   \
    }                                                                                           \
    static __device__ __forceinline__ void pv(float (&d)[32][4], const u32 (&a)[4], u64 b) {    \
      FASTKV_MULTIPLY_PV(256, 128, TYPES, "%128,%129,%130,%131", "%132");                       \
    }                                                                                           \
    static __device__ __forceinline__ void pv(float (&d)[16][4], const u32 (&a)[4], u64 b) {    \
      FASTKV_MULTIPLY_PV(128, 64, TYPES, "%64,%65,%66,%67", "%68");                             \
    }                                                                                           \
    static __device__ __forceinline__ void pv(float (&d)[8][4], const u32 (&a)[4], u64 b) {     \
      FASTKV_MULTIPLY_PV(64, 32, TYPES, "%32,%33,%34,%35", "%36");                              \
    }                                                                                           \
  }
FASTKV_WGMMA(Bf16, "bf16.bf16");
FASTKV_WGMMA(Fp16, "f16.f16");
