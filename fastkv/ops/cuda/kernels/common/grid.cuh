// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch: a kernel may start while the one before it still runs, and waits
// here before it touches memory that the other may write or read. A no-op before sm_90.
#pragma once

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next kernel may start; it still waits for this one's end before it reads.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
