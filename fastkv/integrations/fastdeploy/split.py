# SPDX-License-Identifier: Apache-2.0
"""The engine's two ops that prepare a step on the host.

fastkv's ops need of it the longest lengths, the running sum of keys and its end. The lists of
blocks and tiles are the plan of the engine's own kernels; they are filled so that both can be used
side by side.
"""

from typing import TYPE_CHECKING, Any

from fastkv.contracts.numbers import is_integer
from fastkv.errors import ContractError, PlacementError, ShapeError
from fastkv.integrations.fastdeploy.calls import older_calls
from fastkv.integrations.fastdeploy.tensors import (
    described,
    flat_int32,
    load_paddle,
    require_dtype,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Counts = NDArray[np.int64]


@older_calls(("seq_lens_encoder",))
def pre_cache_len_concat(
    seq_lens_encoder: Any,
    seq_lens_decoder: Any,
    seq_lens_this_time: Any,
    max_dec_len: Any,
    block_size: int,
) -> tuple[Any, Any, Any, Any, Any]:
    """Where each request's contiguous keys begin, and the pages that hold cached ones.

    Args:
        seq_lens_encoder: int32, new prompt tokens, 0 for decode; B rows or more. Decode requests
            get no room for their prefix; in older calls, without this argument, they do.
        seq_lens_decoder: int32, cached tokens; likewise.
        seq_lens_this_time: int32 `[B]`, new tokens.
        max_dec_len: not read.
        block_size: P.

    Returns:
        `cu_seqlens_k` int32 `[B+1]`; request and page of each page with cached keys, int32; their
        number, int32 `[1]` on the CPU; `cu_seqlens_k[B]`, int32 `[1]` on the CPU.

    Raises:
        ContractError: an argument that is missing or misshapen.
    """
    import numpy as np

    op = "pre_cache_len_concat"
    new = _host(op, "seq_lens_this_time", seq_lens_this_time)
    cached = _host(op, "seq_lens_decoder", seq_lens_decoder, len(new))
    gathered = new > 0
    if seq_lens_encoder is not None:
        gathered &= _host(op, "seq_lens_encoder", seq_lens_encoder, len(new)) > 0
    prefix = np.where(gathered, cached, 0)
    sums = np.concatenate([[0], np.cumsum(prefix + np.maximum(new, 0))])
    owners, tiles = _tiles(-(-prefix // _positive(op, "block_size", block_size)))
    place = seq_lens_this_time.place
    on_device = [_tensor(values, place) for values in (sums, owners, tiles)]
    cpu = load_paddle().CPUPlace()
    return (*on_device, _tensor([len(owners)], cpu), _tensor(sums[-1:], cpu))


def get_block_shape_and_split_kv_block(
    seq_lens_encoder: Any,
    seq_lens_decoder: Any,
    seq_lens_this_time: Any,
    decoder_batch_ids: Any,
    decoder_tile_ids_per_batch: Any,
    decoder_num_blocks_cpu: Any,
    decoder_num_blocks_device: Any,
    decoder_chunk_size_device: Any,
    max_len_tensor_cpu: Any,
    encoder_batch_ids: Any,
    encoder_tile_ids_per_batch: Any,
    encoder_num_blocks_x_cpu: Any,
    kv_batch_ids: Any,
    kv_tile_ids_per_batch: Any,
    kv_num_blocks_x_cpu: Any,
    encoder_block_shape_q: int,
    decoder_block_shape_q: int,
    group_size: int,
    block_size: int,
) -> None:
    """Fill the step's lengths, and the plan where its buffers are given.

    Args:
        seq_lens_encoder: int32, new prompt tokens, 0 for decode; B rows or more.
        seq_lens_decoder: int32, cached tokens; likewise.
        seq_lens_this_time: int32 `[B]`, new tokens.
        decoder_batch_ids: int32, written: the request of each block of decode rows. This and every
            other buffer of the plan may be None.
        decoder_tile_ids_per_batch: int32, written: its number within the request.
        decoder_num_blocks_cpu: int32 `[1]`, written.
        decoder_num_blocks_device: int32 `[1]`, written.
        decoder_chunk_size_device: left alone: of MLA.
        max_len_tensor_cpu: int32 `[6]` or longer on the CPU, written: the most new tokens, prompt
            tokens and cached tokens of a request, and of requests with new tokens the most cached
            plus new ones, cached ones of decode, and cached plus new ones where any is cached.
        encoder_batch_ids: as for decode, of prefill rows.
        encoder_tile_ids_per_batch: likewise.
        encoder_num_blocks_x_cpu: likewise.
        kv_batch_ids: as for decode, of pages that prefill requests write.
        kv_tile_ids_per_batch: likewise.
        kv_num_blocks_x_cpu: likewise.
        encoder_block_shape_q: rows times G in a block of prefill rows.
        decoder_block_shape_q: the same of decode rows.
        group_size: G.
        block_size: P.

    Raises:
        ContractError: an argument that is missing, misshapen or too short; nothing has been
            written then.
    """
    op = "get_block_shape_and_split_kv_block"
    given = dict(locals())
    new = _host(op, "seq_lens_this_time", seq_lens_this_time)
    prompt = _host(op, "seq_lens_encoder", seq_lens_encoder, len(new))
    cached = _host(op, "seq_lens_decoder", seq_lens_decoder, len(new))
    names = ("encoder_block_shape_q", "decoder_block_shape_q", "group_size", "block_size")
    rows_q, rows_d, group, page = (_positive(op, name, given[name]) for name in names)
    plan: dict[str, Any] = {"max_len_tensor_cpu": _longest(new, prompt, cached)}
    is_prefill = prompt > 0
    for stage, counts in {
        "encoder": -(-prompt * group // rows_q),
        "decoder": -(-(new * group * ~is_prefill) // rows_d),
        "kv": -(-((prompt + cached % page) * is_prefill) // page),
    }.items():
        owners, tiles = _tiles(counts)
        plan |= {f"{stage}_batch_ids": owners, f"{stage}_tile_ids_per_batch": tiles}
        suffixes = ("_cpu", "_device") if stage == "decoder" else ("_x_cpu",)
        plan |= {f"{stage}_num_blocks{suffix}": [len(owners)] for suffix in suffixes}
    _check_buffers(op, given, plan)
    for name, values in plan.items():
        buffer = given[name]
        if buffer is not None and len(values):
            buffer[: len(values)] = _tensor(values, buffer.place)


def _longest(new: "Counts", prompt: "Counts", cached: "Counts") -> list[int]:
    runs = new > 0
    both = cached + new
    decode = (cached * (prompt <= 0))[runs]
    parts = [new, prompt, cached, both[runs], decode, both[runs & (cached > 0)]]
    return [int(part.max(initial=0)) for part in parts]


def _check_buffers(op: str, given: dict[str, Any], plan: dict[str, Any]) -> None:
    described(op, "max_len_tensor_cpu", given["max_len_tensor_cpu"], "int32 [6] on the CPU")
    for name, values in plan.items():
        if given[name] is None:
            continue
        info = described(op, name, given[name], "an int32 tensor")
        require_dtype(op, name, info, ("int32",))
        if len(info.shape) != 1 or info.shape[0] < len(values):
            expected = f"[{len(values)}] or longer"
            raise ShapeError(op, name, expected=expected, got=str(list(info.shape)))
        if name == "max_len_tensor_cpu" and info.device != "cpu":
            raise PlacementError(op, name, expected="a tensor on the CPU", got=info.device)


def _tiles(counts: "Counts") -> "tuple[Counts, Counts]":
    """Owner and number of each tile, request after request."""
    import numpy as np

    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]


def _host(op: str, name: str, tensor: Any, count: int | None = None) -> "Counts":
    """Lengths on the host, one a request: a copy, and on a GPU a wait."""
    import numpy as np

    if count is None:
        info = described(op, name, tensor, "an int32 tensor [B]")
        count = info.shape[0] if info.shape else 0
    flat = flat_int32(op, name, tensor, count)
    return np.asarray(flat.numpy(), np.int64)


def _tensor(values: Any, place: Any) -> Any:
    import numpy as np

    return load_paddle().to_tensor(np.asarray(values, np.int32), place=place)


def _positive(op: str, name: str, value: Any) -> int:
    if is_integer(value) and value >= 1:
        return int(value)
    got = repr(value) if isinstance(value, int | float) else type(value).__name__
    raise ContractError(op, name, expected="a host integer of at least 1", got=got)
