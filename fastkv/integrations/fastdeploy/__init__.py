# SPDX-License-Identifier: Apache-2.0
"""fastkv underneath FastDeploy: the engine's ops by their own signatures, and its objects as input.

Tensors are Paddle's, which is loaded when the first of them comes along. The signatures are those
of the engine's develop branch of January 2026; where older versions differ, their calls are served
too, told apart by their number of arguments.
"""

from fastkv.integrations.fastdeploy.append_attention import (
    append_attention,
    append_attention_with_output,
)
from fastkv.integrations.fastdeploy.backend import AttentionBackend, meta_from
from fastkv.integrations.fastdeploy.config import spec_from_config
from fastkv.integrations.fastdeploy.convert import cache_from_fastdeploy, cache_to_fastdeploy
from fastkv.integrations.fastdeploy.flash_attention import flash_attn_unpadded, flash_mask_attention
from fastkv.integrations.fastdeploy.gqa_rope_write_cache import gqa_rope_write_cache
from fastkv.integrations.fastdeploy.install import install
from fastkv.integrations.fastdeploy.merge_prefill_decode_output import merge_prefill_decode_output
from fastkv.integrations.fastdeploy.split import (
    get_block_shape_and_split_kv_block,
    pre_cache_len_concat,
)

__all__ = [
    "AttentionBackend",
    "append_attention",
    "append_attention_with_output",
    "cache_from_fastdeploy",
    "cache_to_fastdeploy",
    "flash_attn_unpadded",
    "flash_mask_attention",
    "get_block_shape_and_split_kv_block",
    "gqa_rope_write_cache",
    "install",
    "merge_prefill_decode_output",
    "meta_from",
    "pre_cache_len_concat",
    "spec_from_config",
]
