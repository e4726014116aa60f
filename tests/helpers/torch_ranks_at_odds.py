# SPDX-License-Identifier: Apache-2.0
"""Ranks that make different calls, are late, or die: what each of the others sees, and when.

Ranks 0 and 1 disagree; 3 keeps 2 waiting; then 3 dies, and all others wait for it.
"""

import os
import sys
import time

import torch
import torch.distributed as dist

from fastkv import CacheSpec, LayerCache
from fastkv.distributed import ContextParallel, TensorParallel
from helpers.ranks import leave
from helpers.torch_ranks import join

TIMEOUT = 2.0
SPEC = CacheSpec(2, 1, 16, 4, "none", "float32")


def attend(context, rows=1, cached=5, layer=0, **options):
    cache = LayerCache(SPEC, layer, *(torch.ones(8, 1, 4, 16) for _ in "kv"))
    sums = torch.tensor([0, rows], dtype=torch.int32)
    lengths = torch.tensor([cached], dtype=torch.int32)
    table = torch.arange(6, dtype=torch.int32)[None]
    step = context.step(cu_seqlens_q=sums, cache_seqlens=lengths, block_table=table)
    return step.paged_attention(torch.ones(rows, 2, 16), cache, **options)


def attempt(call):
    """The error's class and text, None for none, and the seconds."""
    begin = time.monotonic()
    try:
        call()
        said = None
    except Exception as error:
        said = (type(error).__name__, str(error))
    return said, time.monotonic() - begin


def at_odds(rank, group):
    """Two ranks; a disagreement that is found in time leaves the group in use."""
    context = ContextParallel(group, 4, timeout=TIMEOUT)
    heads = TensorParallel(group, CacheSpec(1, 2, 16, 4), 4, timeout=TIMEOUT)
    return {
        "rows": attempt(lambda: attend(context, rows=1 + rank)),
        "window": attempt(lambda: attend(context, window=4 + rank)),
        "right": attempt(lambda: attend(context)),
        "lengths": attempt(lambda: attend(context, cached=5 + rank)),
        "other layer": attempt(lambda: attend(context, layer=1)),
        "known layers": attempt(lambda: attend(context, layer=rank)),
        "heads": attempt(lambda: heads.all_gather(torch.ones(1 + rank, 2, 16))),
        # Rank 0 makes a call that both know, rank 1 one that is new to it.
        "new and known": attempt(lambda: attend(context, scale=1.0 if rank else None)),
        "right again": attempt(lambda: attend(context)),
    }


def main(rank, folder):
    world = join(rank, 4, folder)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found = {}
    if rank < 2:
        found = at_odds(rank, pairs[0])
        found["outside"] = attempt(lambda: ContextParallel(pairs[1], 4))
    context = ContextParallel(pairs[1] if rank > 1 else world, 4, timeout=TIMEOUT)
    if rank == 2:
        attempt(lambda: attend(context))
        found["late"] = attempt(lambda: attend(context))
    if rank == 3:
        attempt(lambda: attend(context))
        time.sleep(2 * TIMEOUT)
    every = ContextParallel(world, 4, timeout=20)
    attend(every)
    if rank == 3:
        os._exit(3)
    found["dead"] = attempt(lambda: attend(every))
    leave(folder, rank, found)
    os._exit(0)  # a group that is broken does not end in good order


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[3])
