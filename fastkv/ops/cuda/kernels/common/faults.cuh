// SPDX-License-Identifier: Apache-2.0
// Faults in the values of a batch: a kernel skips what they spoil, and notes the first one where
// the launcher asked for it (FASTKV_CHECK=1). `fastkv/ops/cuda/faults.py` has the same table.
#pragma once

#include "common/numbers.cuh"

enum Fault : i32 {
  kFaultLength = 1,     // cache_seqlens: negative, or past the block table
  kFaultPage = 2,       // block_table: a page id below -1 or past the cache
  kFaultPosition = 3,   // a position past the rope tables
  kFaultQuerySum = 4,   // cu_seqlens_q decreases, or leaves the rows
  kFaultSegment = 5,    // cu_seqlens_k: a segment that does not hold its tokens
  kFaultSource = 6,     // copy_pages: a page id of src
  kFaultTarget = 7,     // copy_pages: a page id of dst
  kFaultInterval = 8,   // mask_offsets: start > end, or past the keys
};

// `word` is null where nobody asked. It holds 0, or the fault times 2^24 plus the request (or the
// pair, in copy_pages), of which the low 24 bits count.
__device__ __forceinline__ void report_fault(i32* word, Fault fault, i32 request) {
  if (word != nullptr) atomicCAS(word, 0, (i32(fault) << 24) | (request & 0xffffff));
}
