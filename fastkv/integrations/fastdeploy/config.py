# SPDX-License-Identifier: Apache-2.0
"""From a model's `config.json` to the spec of the engine's cache."""

from collections.abc import Mapping
from pathlib import Path

from fastkv import engine_config
from fastkv.spec import CacheSpec


def spec_from_config(
    config: Mapping[str, object] | str | Path,
    page_size: int = 64,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    scale_dtype: str | None = None,
) -> CacheSpec:
    """The spec of a rank's cache, as `fastkv.engine_config` reads a config.

    Args:
        config: the parsed config, or the path of the file or of its folder.
        page_size: P; the engine's `block_size`.
        tp_rank: the rank within its tensor-parallel group.
        tp_size: ranks of the group.
        scale_dtype: of the paged scales; None is the model's dtype, as in the engine.

    Raises:
        UnsupportedError: a cache that fastkv does not have: `int8_zp`, `float8_e4m3fn_zp`, MLA's.
        UnknownNameError: a KV-cache quantization that nobody knows.
        SpecError: a key is missing or has a value no cache can have.
        OSError: the file cannot be read.
    """
    parsed = (
        engine_config.parse_config(config)
        if isinstance(config, Mapping)
        else engine_config.read_config(config)
    )
    whole = parsed.spec(page_size, scale_dtype=parsed.dtype if scale_dtype is None else scale_dtype)
    return whole if tp_size == 1 and tp_rank == 0 else whole.shard(tp_rank, tp_size)
