# SPDX-License-Identifier: Apache-2.0
"""After a warm-up no request compiles or loads anything."""

import json

import pytest

import fastkv
from fastkv import CacheSpec, warming
from fastkv.ops.cuda import jit
from helpers.on_gpu import with_helpers

# A backend's steps of a warmed-up spec: prefill, decode and draft rows.
SCRIPT = """
import json
import numpy as np
import fastkv
from fastkv import BatchMeta, CacheSpec, Rope, StaticScales
from fastkv.backends import get_backend
from fastkv.ops.cuda import jit
from helpers.on_gpu import to_gpu
from types import SimpleNamespace

spec = CacheSpec(2, 2, 64, 16, ["cache_int8", "block_wise_fp8"])
rows = fastkv.warmup(spec, num_query_heads=8)
loaded = jit.loaded()
ones = np.ones(2, np.float32)
static = to_gpu(StaticScales(ones, ones, ones, ones), "torch")
caches = spec.allocate(16, "torch", "cuda:0")
backends = [get_backend(spec, name=n, device="cuda:90") for n in ("append", "flash", "flash_mask")]
rope = to_gpu(Rope.from_theta(1e4, 64, 128), "torch")
for new, num_decode in (((40, 3), 0), ((1, 1), 2), ((4, 4), 2), ((1, 24), 1)):
    sums = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    meta = to_gpu(
        dict(
            cu_seqlens_q=sums,
            cu_seqlens_k=sums,
            cache_seqlens=np.zeros(2, np.int32),
            block_table=np.arange(12, dtype=np.int32).reshape(2, 6),
        ),
        "torch",
    )
    meta |= dict(total_k=sum(new), num_decode=num_decode, rope=rope)
    meta = BatchMeta(caches, spec, **meta)
    for layer_id, quant in enumerate(("cache_int8", "block_wise_fp8")):
        layer = SimpleNamespace(layer_id=layer_id, cache_quant_type_str=quant)
        layer.static_scales = static if layer_id == 0 else None
        qkv = to_gpu(np.zeros((sum(new), 12 * 64), np.float32), "torch").bfloat16()
        for backend in backends:
            backend.forward_mixed(qkv, layer, meta)
found = [[row.op, row.format, row.kernels] for row in rows]
print(json.dumps({"rows": found, "new": jit.loaded() - loaded}))
"""


def test_a_warmed_up_process_compiles_nothing_more(run_python):
    said = json.loads(run_python(SCRIPT, **with_helpers()).stdout)
    assert said["new"] == 0
    kernels = {(op, fmt): count for op, fmt, count in said["rows"]}
    assert all(kernels[op, "cache_int8"] >= 1 for op in ("rope_write_kv", "gather_kv"))
    assert kernels["paged_attention", "block_wise_fp8"] >= 1
    assert kernels["merge_states", None] == kernels["masked_attention", None] == 1


def test_cupy_alone_serves_float16():
    spec = CacheSpec(1, 2, 64, 16, "none", "float16")
    model = warming._Model(
        spec, 2, "float16", "cuda:0", "cupy", 64, False, False, False, None, "float32"
    )
    rows = warming._run(model, lambda *_: None)
    assert rows[0].op == "rope_write_kv"


def test_a_second_warm_up_finds_everything_there():
    spec = CacheSpec(1, 2, 128, 32, "cache_int4_zp")
    fastkv.warmup(spec, num_query_heads=4)
    before = jit.loaded()
    again = fastkv.warmup(spec, num_query_heads=4)
    assert {row.kernels for row in again} == {0}
    assert jit.loaded() == before


def test_a_device_that_is_not_there():
    with pytest.raises(fastkv.errors.PlacementError, match="cuda:77"):
        fastkv.warmup(CacheSpec(1, 2, 64, 16), num_query_heads=2, device="cuda:77")
