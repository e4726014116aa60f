# SPDX-License-Identifier: Apache-2.0
"""The ops: each checks its contract, then runs where its tensors live.

CPU tensors run on the NumPy reference, which is the specification. CUDA tensors never do.
"""

from fastkv.ops.copy_pages import copy_pages
from fastkv.ops.dispatch import zeros_beside
from fastkv.ops.gather_kv import gather_kv
from fastkv.ops.masked_attention import masked_attention
from fastkv.ops.merge_states import merge_states
from fastkv.ops.paged_attention import paged_attention
from fastkv.ops.rope_write_kv import rope_write_kv
from fastkv.ops.step import check_step

__all__ = [
    "check_step",
    "copy_pages",
    "gather_kv",
    "masked_attention",
    "merge_states",
    "paged_attention",
    "rope_write_kv",
    "zeros_beside",
]
