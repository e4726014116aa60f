# SPDX-License-Identifier: Apache-2.0
"""The two programs of docs/store.md, as two processes over a real Redis, and its arithmetic."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastkv import CacheSpec
from fastkv.quant import QUANT_SPECS
from fastkv.store import InMemoryBackend, PageStore, page_keys
from fastkv.transfer import Fingerprint, Regions
from helpers.redis_server import RedisServer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "store.md").read_text("utf-8")
EMPTY = "spec.allocate(num_pages=100)\n"
POISON = "for cache in caches:\n    cache.view(np.uint8)[...] = 0x7F\n"


@pytest.fixture
def server(tmp_path):
    started = RedisServer(tmp_path)
    yield started
    started.kill()


def run(folder, name):
    done = subprocess.run(
        [sys.executable, name],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path[1:]])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("quant", ["block_wise_fp8", "none"])
def test_a_second_process_attends_to_a_prefix_it_never_computed(server, tmp_path, quant):
    programs = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.M | re.S)
    assert [name for name, _ in programs] == ["first.py", "second.py"]
    for name, shown in programs:
        text = shown.replace(":6379", f":{server.port}").replace("block_wise_fp8", quant)
        if name == "second.py":
            assert EMPTY in text
            (tmp_path / name).write_text(text.replace(EMPTY, EMPTY + POISON) + "print(pages)\n")
        else:
            (tmp_path / name).write_text(text)
    assert re.search(r"^put: kept +62$", run(tmp_path, "first.py"), re.M)
    assert run(tmp_path, "second.py").strip() == "62"
    assert np.load(tmp_path / "first.npy").std() > 0.01


def test_the_table_of_sizes_is_the_specs():
    (block,) = re.findall(r"<!-- store size -->\n(.*?)<!-- /store size -->", PAGE, re.S)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", block, re.M))
    assert set(rows) == set(QUANT_SPECS)
    for quant, cells in rows.items():
        spec = CacheSpec(32, 8, 128, 16, quant)
        value = spec.bytes_per_token() * 16 + 80
        wanted = [spec.bytes_per_token(), value, (64 << 30) // value * 16]
        assert cells.split(" | ") == [f"{number:,}" for number in wanted], quant


def test_a_value_is_80_bytes_more_than_its_page():
    spec = CacheSpec(2, 2, 64, 16, "block_wise_fp8")
    backend = InMemoryBackend()
    keys = page_keys(list(range(16)), 16)
    with PageStore(
        Regions(spec, spec.allocate(1)), Fingerprint.of(spec, model="m"), backend
    ) as store:
        store.put(keys, [0])
        assert store.counters().bytes_written == spec.bytes_per_token() * 16 + 80
