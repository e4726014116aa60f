# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/distributed.md, on two ranks, as torchrun starts them."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs" / "distributed.md"
# What the second example takes from its surroundings.
BEFORE = """
from fastkv import StaticScales
spec = CacheSpec(1, 8, 64, 16, "cache_int8")
num_pages = 3
static = StaticScales(*(torch.ones(8) for _ in range(4)))
out = torch.full((2, 16, 64), float(dist.get_rank()))
"""
AFTER = """
assert static.k_quant.shape == (4,) and caches[0].shape == (3, 4, 16, 64)
assert out.shape == (2, 32, 64) and out[:, :16].eq(0).all() and out[:, 16:].eq(1).all()
print("ran to the end")
"""


def test_the_examples_run(tmp_path):
    first, second = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    script = tmp_path / "example.py"
    end = "dist.destroy_process_group()\n"
    assert first.endswith(end)
    first = first.removesuffix(end)  # the second goes on with its group
    script.write_text(first + BEFORE + second + AFTER + end, "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ran to the end") == 2
