# SPDX-License-Identifier: Apache-2.0
"""fastkv's functions in place of those that a module of the engine has imported."""

from types import ModuleType
from typing import Any

from fastkv.errors import ContractError
from fastkv.integrations.fastdeploy.append_attention import (
    append_attention,
    append_attention_with_output,
)
from fastkv.integrations.fastdeploy.flash_attention import flash_attn_unpadded, flash_mask_attention
from fastkv.integrations.fastdeploy.gqa_rope_write_cache import gqa_rope_write_cache
from fastkv.integrations.fastdeploy.merge_prefill_decode_output import merge_prefill_decode_output
from fastkv.integrations.fastdeploy.split import (
    get_block_shape_and_split_kv_block,
    pre_cache_len_concat,
)

#: Name in the engine's modules -> fastkv's function.
OPS: dict[str, Any] = {
    "append_attention": append_attention,
    "append_attention_with_output": append_attention_with_output,
    "flash_attention_v3_varlen": flash_attn_unpadded,
    "flash_attn_unpadded": flash_attn_unpadded,
    "flash_mask_attention": flash_mask_attention,
    "get_block_shape_and_split_kv_block": get_block_shape_and_split_kv_block,
    "gqa_rope_write_cache": gqa_rope_write_cache,
    "merge_prefill_decode_output": merge_prefill_decode_output,
    "pre_cache_len_concat": pre_cache_len_concat,
}


def install(module: ModuleType) -> tuple[str, ...]:
    """Replace the ops that a module has by name, such as `…attention.flash_mask_attn_backend`.

    A backend class that keeps Paddle's flash attention as `flash_attn_func`, and would ask the GPU
    which of the two to take, gets fastkv's, with no further arguments.

    Args:
        module: of the engine; a name that it holds as None, for want of a GPU, is replaced too.

    Returns:
        The names that were replaced.

    Raises:
        ContractError: it has none of them.
    """
    found = tuple(name for name in OPS if hasattr(module, name))
    if not found:
        raise ContractError(
            "install",
            "module",
            expected=f"a module with one of {', '.join(OPS)}",
            got=getattr(module, "__name__", type(module).__name__),
        )
    for name in found:
        setattr(module, name, OPS[name])
    for value in vars(module).values():
        if isinstance(value, type) and hasattr(value, "flash_attn_func"):
            value.flash_attn_func = staticmethod(flash_attn_unpadded)
            value.flash_attn_kwargs = {}  # type: ignore[attr-defined]
    return found
