# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="fastkv": the attention function and its mask."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from fastkv.errors import ContractError, ShapeError, UnsupportedError
from fastkv.integrations import torch as fastkv_torch
from fastkv.integrations.transformers.layers import PagedKeys

NAME = "fastkv"
_OP = f"attn_implementation={NAME!r}"


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Write a layer's new keys and values into its pages, and attend over all of them.

    Args:
        module: the attention module, which has the model's `config`.
        query: `[B, Hq, S, D]`, rotated.
        key: what `PagedCache.update` returned.
        value: `[B, Hkv, S, D]`.
        attention_mask: what `intervals` returned.
        dropout: 0.
        scaling: multiplies q.k; None is `1 / sqrt(D)`.
        sliding_window: keys that a row sees, its own included.
        softcap: of the logits.
        s_aux: sinks, `[Hq]`.
        **kwargs: what else the model's attention takes.

    Returns:
        `[B, S, Hq, D]` in query's dtype, and no weights.

    Raises:
        ContractError: anything that fastkv does not serve. Nothing was written then.
    """
    _refuse(module, attention_mask, dropout, kwargs)
    requests, heads, new, dim = query.shape
    q, layer, batch = write(module, query, key, value)
    out = fastkv_torch.paged_attention(
        q,
        layer,
        **batch,
        scale=scaling,
        window=sliding_window or None,
        soft_cap=softcap,
        sinks=None if s_aux is None else s_aux.float(),
        mask_offsets=attention_mask,
    )
    return out.view(requests, new, heads, dim), None


def write(module: Any, query: Any, key: Any, value: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Write a layer's new keys and values into its pages, and attend to nothing.

    Args:
        module: as in `attend`, like all that follows.
        query: likewise.
        key: likewise.
        value: likewise.

    Returns:
        The queries `[B * S, Hq, D]`, the layer's cache, the step's batch tensors.

    Raises:
        ContractError: not what the cache serves. Nothing was written then.
    """
    cache, layer_idx, keys = _paged(key)
    cache.bind(module, layer_idx, query, keys, value)
    requests, _, new, _ = query.shape
    layer, batch = cache.step(layer_idx, new)
    parts = [x.transpose(1, 2).reshape(requests * new, -1) for x in (query, keys, value)]
    return fastkv_torch.rope_write_kv(torch.cat(parts, dim=-1), layer, **batch), layer, batch


def intervals(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Any = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """The keys that each row may see, from a padding mask and a window; made once a forward.

    Causality is the attention's; a mask adds where a request's own keys begin and end. Padding on
    the left and on the right has that form. A window is put into the mask too, once there are more
    keys than it holds: some models (PhiMoE) tell it to their mask and not to their attention.

    Args:
        batch_size: B.
        q_length: S.
        kv_length: keys after this step.
        attention_mask: bool `[B, kv_length]`, or None.
        allow_is_causal_skip: False where the model's mask is not the plain causal one.
        use_vmap: True where it is a function of the caller's.
        local_size: keys that a row sees, its own included; None: all.
        **kwargs: what other implementations need.

    Returns:
        int32 `[B * S, 2]`, or None where causality says it all.

    Raises:
        UnsupportedError: another mask than causal, window and padding; a request whose tokens are
            not in one piece. The latter reads the mask: on the CPU at each step, on a GPU where a
            step has more than one token a request, and not within `torch.compile`.
        ShapeError: a mask of another length.
    """
    if use_vmap or not allow_is_causal_skip:
        raise _unsupported("attention_mask", "causal, with or without a window", "another mask")
    window = None if local_size is None or kv_length <= local_size else local_size
    if attention_mask is None and window is None:
        return None
    if attention_mask is None:
        attention_mask = torch.ones(
            batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device")
        )
    if tuple(attention_mask.shape) != (batch_size, kv_length):
        raise ShapeError(
            _OP,
            "attention_mask",
            expected=f"[B, cached + new] = [{batch_size}, {kv_length}]",
            got=str(list(attention_mask.shape)),
        )
    seen = attention_mask.to(torch.int32)
    start = seen.argmax(-1)
    count = seen.sum(-1)
    end = torch.where(count > 0, kv_length - seen.flip(-1).argmax(-1), start)
    if not torch.compiler.is_compiling() and (q_length > 1 or not seen.is_cuda):
        _require_one_piece(end - start == count)
    both = torch.stack([start, end], dim=-1).to(torch.int32)
    rows = both[:, None].expand(batch_size, q_length, 2)
    if window is not None:
        at = torch.arange(kv_length - q_length, kv_length, dtype=torch.int32, device=both.device)
        first = torch.maximum(rows[..., 0], at - (window - 1))
        rows = torch.stack([torch.minimum(first, rows[..., 1]), rows[..., 1]], dim=-1)
    return rows.reshape(batch_size * q_length, 2)


def _require_one_piece(whole: Any) -> None:
    if not bool(whole.all()):
        request = int((~whole).nonzero()[0])
        raise _unsupported(
            "attention_mask",
            "each request's tokens in one piece, padding before or behind",
            f"padding within request {request}",
        )


def _paged(key: Any) -> tuple[Any, int, Any]:
    if not isinstance(key, PagedKeys):
        raise _unsupported(
            "past_key_values",
            "a fastkv.integrations.transformers.PagedCache",
            "no cache or another one",
        )
    if key.taken:
        # A second write would count the step's tokens twice, and another layer's would mix them.
        raise _unsupported(
            "model", "one attention over the keys of a layer", "a second one over the same keys"
        )
    key.taken = True
    return key.cache, key.layer_idx, key.keys


def _refuse(module: Any, mask: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """What would be computed as something else than asked for."""
    if module.training:
        raise _unsupported(
            "model", "model.eval(): the ops have no gradients", "a model in training"
        )
    if dropout:
        raise _unsupported("dropout", "0", repr(dropout))
    if mask is not None and mask.ndim != 2:
        raise _unsupported("attention_mask", "[B, cached + new]", f"a mask {list(mask.shape)}")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise _unsupported("is_causal", "True", "False")
    if kwargs.get("position_bias") is not None:
        raise _unsupported("position_bias", "None", "a bias")
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise _unsupported("output_attentions", "False: weights are never whole", "True")


def _unsupported(argument: str, expected: str, got: str) -> ContractError:
    return UnsupportedError(_OP, argument, expected=expected, got=got)


def register() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, intervals)
