# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own code, on a tiny model; the times that it prints here mean nothing."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from fastkv import CacheSpec
from fastkv.ops.cuda import jit
from fastkv.quant import QUANT_SPECS

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
PEERS = ("quanto", "hqq")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module("bench_transformers")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("gpu", "bench_transformers"):
            del sys.modules[name]


def test_every_cache_has_a_row_and_what_is_missing_is_told(bench, tmp_path):
    path = tmp_path / "result.json"
    sizes = ["--rounds", "1", "--batch", "2", "--context", "200", "--layers", "2", "--page", "16"]
    bench.main([*sizes, "--tiny", "--tokens", "4", "--chunk", "150", "--json", str(path)], "cpu")
    found = json.loads(path.read_text("utf-8"))
    rows = {(row["cache"], row["batch"]): row for row in found["rows"]}
    names = ["DynamicCache sdpa", *(f"PagedCache {name}" for name in QUANT_SPECS)]
    assert set(rows) == {(name, batch) for name in names for batch in (2,)}
    assert len(found["errors"]) == 2
    for peer in PEERS:
        assert sum(f"QuantizedCache {peer} 4 bit" in error for error in found["errors"]) == 1
    for (name, batch), row in rows.items():
        assert row["context"] == 200
        assert row["ms_per_step"] > 0
        assert row["times_dynamic"] == pytest.approx(
            rows["DynamicCache sdpa", batch]["ms_per_step"] / row["ms_per_step"]
        )
        tokens = 208 if name.startswith("Paged") else 207  # whole pages; what was cached
        form = name.removeprefix("PagedCache ") if name.startswith("Paged") else "none"
        kept = CacheSpec(2, 2, 64, 16, form, "float32").bytes_per_token() * tokens * batch
        assert kept <= row["held_bytes"] < 1.5 * kept + 40_000
    assert found["versions"]["transformers"]
    assert found["model"]["layers"] == 2
    kernels = ["copy_pages", "gather_kv", "paged_attention", "rope_write_kv"]
    assert found["digests"] == jit.source_digests(kernels)


def test_it_needs_a_gpu_unless_told(bench):
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        bench.main([])
