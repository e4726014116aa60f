# SPDX-License-Identifier: Apache-2.0
"""What the memory of this device gives today: the figures that every op is held against."""

from collections.abc import Callable
from typing import Any

import torch

from gpu.timing import Calls, Timer, Timing

BYTES = 2 * 1024**3

# 16 bytes a load, several loads in flight, blocks that stride over the whole array.
COPY_SOURCE = r"""
extern "C" __global__ void __launch_bounds__(512)
copy16(const uint4* __restrict__ from, uint4* __restrict__ to, unsigned long long n) {
  const unsigned long long step = (unsigned long long)gridDim.x * 512;
  unsigned long long i = (unsigned long long)blockIdx.x * 512 + threadIdx.x;
  for (; i + (UNROLL - 1) * step < n; i += UNROLL * step) {
    uint4 x[UNROLL];
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) x[j] = __ldcs(from + i + j * step);
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) __stcs(to + i + j * step, x[j]);
  }
  for (; i < n; i += step) to[i] = from[i];
}
"""


def measure(timer: Timer, device: torch.device, size: int = BYTES) -> dict[str, float]:
    """TB/s of a library's copy, of a copy kernel, and of reading alone."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    floats = torch.empty(size // 4, dtype=torch.float32, device=device).uniform_()
    contenders: dict[str, Calls] = {
        "copy": [lambda: target.copy_(source)],
        "read": [lambda: torch.sum(floats)],
    }
    for unroll in (4, 8):
        try:
            run = copy_kernel(source, target, unroll)
        except Exception as error:
            print(f"no copy kernel: {error!r:.200}", flush=True)
            break
        contenders[f"copy_kernel_{unroll}"] = [run]
    moved = {"read": size}
    found = {
        name: moved.get(name, 2 * size) / timing.us / 1e6
        for name, timing in timer.measure(contenders).items()
        if isinstance(timing, Timing)
    }
    copies = [rate for name, rate in found.items() if name.startswith("copy")]
    ceilings = {"read_TBps": max(found["read"], *copies), "copy_TBps": max(copies)}
    return {**ceilings, **{f"{name}_measured_TBps": rate for name, rate in found.items()}}


def copy_kernel(source: torch.Tensor, target: torch.Tensor, unroll: int) -> Callable[[], Any]:
    """A copy kernel of our own, compiled by CuPy, on PyTorch's stream of each call."""
    import cupy
    import numpy as np

    code = COPY_SOURCE.replace("UNROLL", str(unroll))
    kernel = cupy.RawModule(code=code, options=("-std=c++17",)).get_function("copy16")
    processors = torch.cuda.get_device_properties(source.device).multi_processor_count
    arguments = (
        np.uint64(source.data_ptr()),
        np.uint64(target.data_ptr()),
        np.uint64(source.numel() * source.element_size() // 16),
    )

    def run() -> None:
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            kernel((4 * processors,), (512,), arguments)

    run()
    torch.cuda.synchronize()
    assert bool((target[: 1 << 20] == source[: 1 << 20]).all()), "the copy kernel copies"
    return run
