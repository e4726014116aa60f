# SPDX-License-Identifier: Apache-2.0
"""The requests of a step as the engine describes them, and which of them an op is about.

The engine mixes prefill and decode requests in any order. An op that serves some of them gives the
others a block table of -1: what they write is dropped and they see no key. Nothing is sorted, and
nothing is read back from the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastkv.errors import ShapeError
from fastkv.integrations.fastdeploy.tensors import described, flat_int32, load_paddle, require_dtype


@dataclass(frozen=True, slots=True)
class Requests:
    """B requests of one step.

    Attributes:
        cu_seqlens_q: int32 `[B+1]`.
        cached: int32 `[B]`, tokens in the cache before this step.
        is_prefill: bool `[B]`: the request has prompt tokens in this step.
        block_table: int32 `[B, M]`.
    """

    cu_seqlens_q: Any
    cached: Any
    is_prefill: Any
    block_table: Any

    @classmethod
    def of(
        cls,
        op: str,
        seq_lens_encoder: Any,
        seq_lens_decoder: Any,
        seq_lens_this_time: Any,
        cu_seqlens_q: Any,
        block_tables: Any,
        fmt: str | None = None,
    ) -> "Requests":
        """The first B rows of the engine's tensors, B being the length of `seq_lens_this_time`.

        Args:
            op: names the caller in errors.
            seq_lens_encoder: int32 `[B]` or longer, also `[…, 1]`: prompt tokens of this step, 0
                for decode.
            seq_lens_decoder: likewise: tokens in the cache.
            seq_lens_this_time: int32 `[B]`: new tokens.
            cu_seqlens_q: int32 `[B+1]` or longer.
            block_tables: int32 `[B, M]` or longer.
            fmt: format of the cache, for errors.
        """
        info = described(op, "seq_lens_this_time", seq_lens_this_time, "int32 [B]", fmt)
        count = info.shape[0] if info.shape else 0
        flat_int32(op, "seq_lens_this_time", seq_lens_this_time, count, fmt)
        prompt = flat_int32(op, "seq_lens_encoder", seq_lens_encoder, count, fmt)
        table = described(op, "block_tables", block_tables, "int32 [B, M]", fmt)
        require_dtype(op, "block_tables", table, ("int32",), fmt)
        if len(table.shape) != 2 or table.shape[0] < count:
            raise ShapeError(
                op,
                "block_tables",
                format=fmt,
                expected=f"[{count}, M], or longer",
                got=str(list(table.shape)),
            )
        return cls(
            cu_seqlens_q=flat_int32(op, "cu_seqlens_q", cu_seqlens_q, count + 1, fmt),
            cached=flat_int32(op, "seq_lens_decoder", seq_lens_decoder, count, fmt),
            is_prefill=prompt > 0,
            block_table=block_tables if table.shape[0] == count else block_tables[:count],
        )

    @classmethod
    def from_fields(cls, op: str, given: Mapping[str, Any], fmt: str | None = None) -> "Requests":
        """The same from a mapping that holds the engine's tensors by name."""
        return cls.of(
            op,
            given["seq_lens_encoder"],
            given["seq_lens_decoder"],
            given["seq_lens_this_time"],
            given["cu_seqlens_q"],
            given["block_tables"],
            fmt,
        )

    def only(self, served: Any) -> "Requests":
        """The same, but those that `served` (bool `[B]`) does not mark have no page."""
        paddle = load_paddle()
        table = paddle.where(
            served.unsqueeze(1), self.block_table, paddle.full_like(self.block_table, -1)
        )
        return replace(self, block_table=table)

    def paged(self) -> dict[str, Any]:
        """What fastkv's paged ops take."""
        return {
            "cu_seqlens_q": self.cu_seqlens_q,
            "cache_seqlens": self.cached,
            "block_table": self.block_table,
        }


def rows_of(served: Any, cu_seqlens_q: Any, rows: int) -> Any:
    """Bool `[T]`: the rows of the requests that `served` marks.

    Args:
        served: bool `[B]`.
        cu_seqlens_q: int32 `[B+1]`.
        rows: T; rows from `cu_seqlens_q[B]` on are nobody's.
    """
    paddle = load_paddle()
    if not served.shape[0]:
        return paddle.zeros([rows], dtype="bool")
    at = paddle.arange(rows, dtype="int32")
    behind = paddle.searchsorted(cu_seqlens_q, at, right=True) - 1
    owner = paddle.clip(behind, 0, served.shape[0] - 1)
    owned = (at >= cu_seqlens_q[0]) & (at < cu_seqlens_q[-1])
    return owned & paddle.gather(served.astype("int32"), owner).astype("bool")
