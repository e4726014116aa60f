# SPDX-License-Identifier: Apache-2.0
"""What `append_attention` and `append_attention_with_output` do."""

from collections.abc import Mapping
from typing import Any

from fastkv import arrays, ops
from fastkv.cache import LayerCache
from fastkv.contracts.numbers import is_integer
from fastkv.errors import ContractError, PlacementError, ShapeError
from fastkv.integrations.fastdeploy.arguments import add_bias, float32_sinks, norm_arguments
from fastkv.integrations.fastdeploy.calls import refuse_unserved, reported_as
from fastkv.integrations.fastdeploy.layer_cache import layer_cache, names_of
from fastkv.integrations.fastdeploy.masks import intervals
from fastkv.integrations.fastdeploy.requests import Requests
from fastkv.integrations.fastdeploy.rotary import rope_of
from fastkv.integrations.fastdeploy.tensors import described, require_dtype, require_shape

_SCALES = (
    "k_quant_scale",
    "v_quant_scale",
    "k_dequant_scale",
    "v_dequant_scale",
    "cache_k_zp",
    "cache_v_zp",
)
_NAMES = {
    "cache_seqlens": "seq_lens_decoder",
    "block_table": "block_tables",
    "mask_offsets": "mask_offset",
    "norm_eps": "rms_norm_eps",
    "rope": "rotary_embs",
    "rope.cos": "rotary_embs",
    "rope.sin": "rotary_embs",
    "window": "sliding_window",
}


def append(op: str, given: Mapping[str, Any]) -> Any:
    """Check everything, then write and attend.

    Args:
        op: the engine's op, for errors.
        given: its arguments by name; see `append_attention`.
    """
    refuse_unserved(op, str(given["cache_quant_type"]), given)
    scales = {name: given[name] for name in _SCALES}
    cache = layer_cache(
        op, given["key_cache"], given["value_cache"], scales, given["cache_quant_type"]
    )
    fmt = cache.quant.name.value
    write = _write_arguments(op, given, cache)
    requests = _requests(op, given, fmt)
    qkv = add_bias(op, given["qkv"], given["qkv_bias"], fmt)
    attend = _attention_arguments(op, given, int(qkv.shape[0]), fmt)
    out = _out(op, given.get("out"), qkv, cache)
    with reported_as(op, _NAMES | names_of(scales)):
        return _run(op, qkv, cache, requests, write, attend, out)


def _run(
    op: str,
    qkv: Any,
    cache: LayerCache,
    requests: Requests,
    write: Mapping[str, Any],
    attend: Mapping[str, Any],
    out: Any,
) -> Any:
    paged = requests.paged()
    seen = {name: attend[name] for name in ("sinks", "mask_offsets")}
    ops.check_step(op, qkv, cache, **paged, **seen)
    rows, dim = int(qkv.shape[0]), cache.spec.head_dim
    q = ops.rope_write_kv(qkv, cache, **paged, **write)
    heads = None if out is None or not rows else out.view([rows, -1, dim])
    found = ops.paged_attention(q, cache, **paged, **attend, out=heads)
    return found.reshape([rows, q.shape[1] * dim]) if out is None else out


def _write_arguments(op: str, given: Mapping[str, Any], cache: LayerCache) -> dict[str, Any]:
    fmt = cache.quant.name.value
    norm = norm_arguments(
        op, given["q_norm_weight"], given["k_norm_weight"], given["rms_norm_eps"], fmt
    )
    rope = None
    if given["rotary_embs"] is not None:
        neox = given["use_neox_rotary_style"]
        rope = rope_of(op, given["rotary_embs"], cache.spec.head_dim, neox, fmt)
    return {"rope": rope, **norm}


def _attention_arguments(
    op: str,
    given: Mapping[str, Any],
    rows: int,
    fmt: str,
) -> dict[str, Any]:
    window = given["sliding_window"]
    if not is_integer(window) or window < 0:
        raise ContractError(
            op,
            "sliding_window",
            format=fmt,
            expected="an integer of at least 0",
            got=repr(window) if isinstance(window, int | float) else type(window).__name__,
        )
    found: dict[str, Any] = {"causal": bool(given["causal"]), "window": window or None}
    found |= {"sinks": float32_sinks(op, given["sinks"], fmt), "mask_offsets": None}
    if given["mask_offset"] is not None:
        offsets = intervals(op, "mask_offset", given["mask_offset"], rows, window or None, fmt)
        found |= {"mask_offsets": offsets, "causal": False, "window": None}
    return found


def _requests(op: str, given: Mapping[str, Any], fmt: str) -> Requests:
    requests = Requests.from_fields(op, given, fmt)
    if _longest_prompt(op, given["set_max_lengths"], fmt) > 0:
        return requests
    return requests.only(~requests.is_prefill)


def _longest_prompt(op: str, set_max_lengths: Any, fmt: str) -> int:
    """Entry 1 of the engine's lengths, which live on the host."""
    info = described(op, "set_max_lengths", set_max_lengths, "int32 on the CPU", fmt)
    require_dtype(op, "set_max_lengths", info, ("int32",), fmt)
    if info.device != "cpu":
        raise PlacementError(
            op, "set_max_lengths", format=fmt, expected="a tensor on the CPU", got=info.device
        )
    if len(info.shape) != 1 or info.shape[0] < 2:
        raise ShapeError(
            op,
            "set_max_lengths",
            format=fmt,
            expected="[2] or longer",
            got=str(list(info.shape)),
        )
    return int(arrays.to_host(set_max_lengths)[1])


def _out(op: str, out: Any, qkv: Any, cache: LayerCache) -> Any:
    """The caller's output, checked before anything is written."""
    if out is None:
        return None
    fmt = cache.quant.name.value
    info, given = arrays.describe(out, op, "out"), arrays.describe(qkv, op, "qkv")
    width = given.shape[-1] - 2 * cache.spec.num_kv_heads * cache.spec.head_dim
    require_dtype(op, "out", info, (given.dtype,), fmt)
    require_shape(op, "out", info, (given.shape[0], width), fmt)
    if not out.is_contiguous():
        raise ShapeError(op, "out", format=fmt, expected="a dense tensor", got="a strided one")
    return out
