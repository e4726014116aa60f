# SPDX-License-Identifier: Apache-2.0
"""The engine's op that puts the decode rows among the prefill rows."""

from typing import Any

from fastkv.integrations.fastdeploy.requests import rows_of
from fastkv.integrations.fastdeploy.tensors import (
    assign_rows,
    described,
    flat_int32,
    require_dtype,
    require_shape,
)


def merge_prefill_decode_output(
    encoder_res: Any,
    decoder_res: Any,
    seq_lens_encoder: Any,
    seq_lens_decoder: Any,
    seq_lens_this_time: Any,
    cu_seq_q: Any,
    head_num: int,
    head_dim: int,
    max_token: int,
) -> None:
    """Copy the rows of the decode requests from `decoder_res` into `encoder_res`.

    A decode request has no prompt tokens in this step and some tokens in the cache. It is a choice
    of rows: nothing is weighed.

    Args:
        encoder_res: `[T, Hq * D]`, written.
        decoder_res: `[T, Hq * D]`, of the same dtype.
        seq_lens_encoder: int32, 0 for decode; B rows or more.
        seq_lens_decoder: int32, cached tokens; likewise.
        seq_lens_this_time: int32 `[B]`, new tokens.
        cu_seq_q: int32 `[B+1]`.
        head_num: Hq.
        head_dim: D.
        max_token: not read: the most tokens that a decode request has.

    Raises:
        ContractError: an argument that is missing or misshapen; nothing has been written then.
    """
    op = "merge_prefill_decode_output"
    info = described(op, "encoder_res", encoder_res, "a tensor [T, Hq * D]")
    require_shape(op, "encoder_res", info, (*info.shape[:1], head_num * head_dim))
    other = described(op, "decoder_res", decoder_res, "a tensor [T, Hq * D]")
    require_shape(op, "decoder_res", other, info.shape)
    require_dtype(op, "decoder_res", other, (info.dtype,))
    new = described(op, "seq_lens_this_time", seq_lens_this_time, "an int32 tensor [B]")
    count = new.shape[0] if new.shape else 0
    prompt = flat_int32(op, "seq_lens_encoder", seq_lens_encoder, count)
    cached = flat_int32(op, "seq_lens_decoder", seq_lens_decoder, count)
    sums = flat_int32(op, "cu_seq_q", cu_seq_q, count + 1)
    rows = rows_of((prompt == 0) & (cached > 0), sums, info.shape[0])
    assign_rows(rows, decoder_res, encoder_res)
