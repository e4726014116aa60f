// SPDX-License-Identifier: Apache-2.0
// Global memory in units of up to 16 bytes a thread, and eight neighbouring elements as float32.
#pragma once

#include "common/numbers.cuh"

// N 32-bit words from or to an address that is aligned to min(16, 4 * N) bytes.
template <int N> __device__ __forceinline__ void load_words(const void* from, u32 (&w)[N]) {
  static_assert(N == 1 || N == 2 || N % 4 == 0, "4, 8 or a multiple of 16 bytes");
  if constexpr (N == 1) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(w[0]) : "l"(from));
  } else if constexpr (N == 2) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(from));
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[i]), "=r"(w[i + 1]), "=r"(w[i + 2]), "=r"(w[i + 3])
                   : "l"(static_cast<const char*>(from) + 4 * i));
    }
  }
}

// The same for what is read once: it does not push reused lines out of the L1 cache.
template <int N> __device__ __forceinline__ void load_words_once(const void* from, u32 (&w)[N]) {
  static_assert(N == 1 || N == 2 || N % 4 == 0, "4, 8 or a multiple of 16 bytes");
  if constexpr (N == 1) {
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(w[0]) : "l"(from));
  } else if constexpr (N == 2) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(w[0]), "=r"(w[1])
                 : "l"(from));
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[i]), "=r"(w[i + 1]), "=r"(w[i + 2]), "=r"(w[i + 3])
                   : "l"(static_cast<const char*>(from) + 4 * i));
    }
  }
}

template <int N> __device__ __forceinline__ void store_words(void* to, const u32 (&w)[N]) {
  static_assert(N == 1 || N == 2 || N % 4 == 0, "4, 8 or a multiple of 16 bytes");
  if constexpr (N == 1) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(w[0]) : "memory");
  } else if constexpr (N == 2) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(w[0]), "r"(w[1]) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(static_cast<char*>(to) + 4 * i),
                   "r"(w[i]), "r"(w[i + 1]), "r"(w[i + 2]), "r"(w[i + 3])
                   : "memory");
    }
  }
}

// Words of eight elements of T.
template <class T> constexpr int kWordsOf8 = 2 * int(sizeof(T));

template <class T>
__device__ __forceinline__ void unpack8(const u32 (&w)[kWordsOf8<T>], float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(w[i]);
    } else {
      x[i] = i % 2 ? high_float(w[i / 2], T{}) : low_float(w[i / 2], T{});
    }
  }
}

template <class T>
__device__ __forceinline__ void pack8(const float (&x)[8], u32 (&w)[kWordsOf8<T>]) {
#pragma unroll
  for (int i = 0; i < kWordsOf8<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      w[i] = __float_as_uint(x[i]);
    } else {
      w[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
    }
  }
}

// Eight elements of T at a 16-byte aligned address.
template <class T> __device__ __forceinline__ void load8(const T* from, float (&x)[8]) {
  u32 w[kWordsOf8<T>];
  load_words(from, w);
  unpack8<T>(w, x);
}

template <class T> __device__ __forceinline__ void store8(T* to, const float (&x)[8]) {
  u32 w[kWordsOf8<T>];
  pack8<T>(x, w);
  store_words(to, w);
}
