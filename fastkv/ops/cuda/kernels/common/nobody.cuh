// SPDX-License-Identifier: Apache-2.0
// Rows of an attention's output that belong to no request.
#pragma once
#include "common/numbers.cuh"

// The rows [0, tokens) outside [begin, end): behind the last request 0, and -inf as lse. Before the
// first one they are left alone, but what the op made itself (`fresh`, or any lse) is written
// everywhere. Called by the threads [0, threads) of each block.
template <int kD, class T>
__device__ __forceinline__ void clear_rows(int thread, int threads, T* out, i64 out_token, i64 out_head, float* lse, int tokens,
                                           int heads, bool fresh, int begin, int end) {
  constexpr int kVectors = kD / 4;
  begin = min(max(begin, 0), tokens);
  end = min(max(end, begin), tokens);
  const int before = fresh || lse != nullptr ? begin : 0;
  const i64 count = i64(before + tokens - end) * heads * kVectors;
  const i64 step = i64(gridDim.x) * threads;
  for (i64 i = i64(blockIdx.x) * threads + thread; i < count; i += step) {
    const int vector = i % kVectors, head = i / kVectors % heads;
    int token = int(i / kVectors / heads);
    if (token >= before) token += end - before;
    T* at = out + token * out_token + head * out_head + 4 * vector;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (token >= begin || fresh) at[j] = from_float<T>(0.f);
    }
    if (lse != nullptr && vector == 0) lse[i64(token) * heads + head] = __int_as_float(0xff800000);
  }
}
