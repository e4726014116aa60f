# SPDX-License-Identifier: Apache-2.0
"""Caches with random bytes, for what moves blocks."""

import numpy as np

from fastkv import CacheSpec
from fastkv.arrays import numpy_dtype

QUANT = ("block_wise_fp8", "cache_int8", "none", "cache_int4_zp")


def spec_of(quant=QUANT, **changes):
    layers = len(quant) if not isinstance(quant, str) else 2
    sizes = {"num_kv_heads": 3, "head_dim": 16, "page_size": 4, "dtype": "float16", **changes}
    return CacheSpec(num_layers=layers, quant=quant, **sizes)


def random_caches(spec, num_blocks, seed):
    """A cache whose every byte is random; no two bytes are related."""
    rng = np.random.default_rng(seed)
    caches = spec.allocate(num_blocks)
    for array in caches:
        raw = array.view(np.uint8)
        raw[...] = rng.integers(0, 256, raw.shape, np.uint8)
    return caches


def block_bytes(caches, block_id):
    """The bytes of one block, by nothing but NumPy's indexing."""
    return b"".join(array[block_id].tobytes() for array in caches)


def mapped_caches(spec, num_blocks, path, seed=None):
    """A cache in a file that several processes map; filled with random bytes for a seed."""
    tensors = spec.tensors(num_blocks)
    total = sum(tensor.nbytes for tensor in tensors)
    memory = np.memmap(path, np.uint8, "r+" if path.exists() else "w+", shape=(total,))
    if seed is not None:
        memory[...] = np.frombuffer(np.random.default_rng(seed).bytes(total), np.uint8)
    caches, at = [], 0
    for tensor in tensors:
        raw = np.asarray(memory)[at : at + tensor.nbytes]
        caches.append(raw.view(numpy_dtype(tensor.dtype)).reshape(tensor.shape))
        at += tensor.nbytes
    return caches
