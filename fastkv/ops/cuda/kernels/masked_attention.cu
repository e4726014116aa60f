// SPDX-License-Identifier: Apache-2.0
// Attention over contiguous K and V, with an interval of visible keys per row.
//
// Grid: the blocks that are resident at once, or fewer; each takes its tile of rows of each round.
// Shapes: q [T, Hq, D], k and v [Tk, Hkv, D], at any strides of 16 bytes.
//
// A row's result depends on its request, and its own tile of 128 rows, alone, bit for bit: tiles of
// keys are taken from the last to the first, whoever takes them.
#include "common/grid.cuh"
#include "common/nobody.cuh"
#if FASTKV_WARPGROUPS
#include "masked/warpgroups.cuh"
#else
#include "masked/warps.cuh"
#endif

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    masked_attention(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 memory[];
  wait_for_previous_kernel();
  let_next_kernel_start();
  attend_all(p, memory);
  const int writer = int(threadIdx.x) - kFirstWriter;
  if (writer >= 0) {
    clear_rows<kD>(writer, kThreads - kFirstWriter, p.out, p.out_token, p.out_head, p.lse, p.tokens,
                   p.kv_heads * p.group, p.fresh, p.cu_seqlens_q[0], p.cu_seqlens_q[p.requests]);
  }
}
