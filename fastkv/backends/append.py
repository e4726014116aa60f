# SPDX-License-Identifier: Apache-2.0
"""The append backend: write, then attend over the pages."""

from typing import Any

from fastkv.backends.base import Backend, LayerOptions, batch_arguments
from fastkv.batch import BatchMeta
from fastkv.cache import LayerCache


class AppendBackend(Backend):
    """`rope_write_kv`, then `paged_attention` for all rows."""

    name = "append"

    def _forward(self, qkv: Any, cache: LayerCache, options: LayerOptions, meta: BatchMeta) -> Any:
        batch = batch_arguments(meta)
        q = self.ops.rope_write_kv(qkv, cache, **batch, rope=meta.rope, **options.write_arguments())
        return self.ops.paged_attention(
            q, cache, **batch, **options.attention_arguments(), mask_offsets=meta.mask_offsets
        )
