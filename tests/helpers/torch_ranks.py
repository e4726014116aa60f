# SPDX-License-Identifier: Apache-2.0
"""A rank of a gloo group: every case of context parallelism, and tensor parallelism."""

import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fastkv import arrays, ops
from fastkv.distributed import ContextParallel, TensorParallel
from helpers.batches import FORMATS, make_batch
from helpers.parallel_cases import CASES, P, layer_to, run, to
from helpers.ranks import leave


def join(rank, size, folder, timeout=30):
    """Found the group of all ranks over a file."""
    store = dist.FileStore(str(Path(folder) / "store"), size)
    seconds = timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=seconds)
    return dist.group.WORLD


def heads(group, fmt, context=None):
    """Attention of this rank's heads, gathered; over parts of the context if there is one."""
    rng = np.random.default_rng(7)
    batch = make_batch(rng, fmt, kv_heads=2, group=4).fill(rng, "cached")
    parallel = TensorParallel(group, batch.cache.spec, batch.query_heads, timeout=20)
    own = parallel.kv_heads
    static = batch.cache.static and parallel.scales(batch.cache.static)
    tensors = {
        name: np.ascontiguousarray(tensor[:, own.start : own.stop])
        for name in ("k", "v", "k_scale", "v_scale")
        if (tensor := getattr(batch.cache, name)) is not None
    }
    cache = layer_to("torch", type(batch.cache)(parallel.spec, 0, **tensors, static=static))
    qkv = np.concatenate([batch.qkv[:, part] for part in parallel.columns()], axis=1)
    meta = {name: to("torch", value) for name, value in batch.meta.items()}
    if context is None:
        q = ops.rope_write_kv(to("torch", qkv), cache, **meta)
        out = ops.paged_attention(q, cache, **meta)
    else:
        step = context.step(**meta)
        out = step.paged_attention(step.rope_write_kv(to("torch", qkv), cache), cache)
    return arrays.to_host(parallel.all_gather(out)).copy()


def main(rank, size, folder):
    torch.set_num_threads(1)
    world = join(rank, size, folder)
    found = {}
    for name, case in CASES.items():
        context = ContextParallel(world, case.get("page", P), timeout=20)
        found[name] = run(context, name, "torch")
    for fmt in FORMATS:
        found[f"heads {fmt}"] = heads(world, fmt)
    if size == 4:
        # Ranks 0 and 1 share out a context, 2 and 3 the same one with other heads.
        lines = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        context = ContextParallel(lines[rank // 2], P, timeout=20)
        found["heads and context"] = heads(across[rank % 2], "cache_int4_zp", context)
    leave(folder, rank, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
