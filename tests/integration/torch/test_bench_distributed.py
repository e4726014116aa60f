# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own code on two gloo ranks, as torchrun starts it. No time in it counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fastkv.ops.cuda import jit

ROOT = Path(__file__).resolve().parents[3]


def test_two_ranks_give_a_row_against_one(tmp_path):
    written = tmp_path / "it.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "benchmarks" / "bench_distributed.py")]
    command += ["--device", "cpu", "--contexts", "128", "--batches", "2", "--page", "16"]
    command += ["--formats", "none,cache_int4_zp", "--calls", "1", "--replays", "2"]
    # The ranks import modules that lie beside the benchmark; PYTHONSAFEPATH leaves its folder out.
    folders = [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, "--json", str(written)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(written.read_text())
    assert document["errors"] == []
    assert [row["format"] for row in document["rows"]] == ["none", "cache_int4_zp"]
    for row in document["rows"]:
        assert row["op"] == "decode_step"
        assert row["shape"] == "2x128 Hq32 Hkv8 D128 P16 R2"
        assert (row["peer"], row["mode"]) == ("one GPU", "eager")
        assert row["off"] < 0.01
        assert min(row["us"], row["peer_us"]) > 0
    assert document["ceilings"] == {"ranks": 2.0}
    kernels = ["merge_states", "paged_attention", "rope_write_kv"]
    assert document["digests"] == jit.source_digests(kernels)
