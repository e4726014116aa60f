# SPDX-License-Identifier: Apache-2.0
"""How the GPU suite runs under scripts/sanitize.py: launches counted, no pool of memory."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def counted_launches():
    """Write the number of launches to the file of `FASTKV_COUNT_LAUNCHES`, where it is set."""
    path = os.environ.get("FASTKV_COUNT_LAUNCHES")
    if path is None:
        yield
        return
    import cupy

    from fastkv.ops.cuda import launch

    # PyTorch has PYTORCH_NO_CUDA_MEMORY_CACHING=1 for it.
    cupy.cuda.set_allocator(None)
    real, count = launch.Kernel.launch, [0]

    def counted(*args):
        count[0] += 1
        return real(*args)

    launch.Kernel.launch = counted
    yield
    launch.Kernel.launch = real
    Path(path).write_text(f"{count[0]}")
