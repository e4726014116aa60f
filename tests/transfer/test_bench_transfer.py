# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own code, on little data over one transport. No time in it counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_case_gives_a_row(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_transfer.py"), "--quick"]
    done = subprocess.run(
        [*command, "--transport", "default", "--json", str(path)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text("utf-8"))["rows"]
    parts = [row for row in rows if row["kind"] == "part"]
    assert [(row["part_bytes"] >> 10, row["checksums"]) for row in parts] == [
        (kib, sums) for kib in (4, 16, 64, 256, 1024) for sums in (False, True)
    ]
    requests = {row["format"]: row for row in rows if row["kind"] == "request"}
    assert list(requests) == ["none", "cache_fp8", "block_wise_fp8", "cache_int4_zp"]
    assert requests["none"]["bytes"] == 4 * requests["cache_int4_zp"]["bytes"]
    assert requests["none"]["bytes"] == 4 * 512 * 2 * 8 * 128 * 2  # layers, tokens, K and V
    for row in rows:
        assert min(row["raw_s"], row["push_s"], row["pull_s"]) > 0
        speed = row["bytes"] / row["push_s"] / 1e9
        assert abs(row["push_GBps"] / speed - 1) < 1e-9
