# SPDX-License-Identifier: Apache-2.0
"""The Llama decoder (Touvron et al., arXiv:2302.13971) in NumPy, its attention left to the caller.

Shapes use T tokens, C hidden size, Hq query heads, Hkv KV heads, D head dim.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.eval.gguf_llama import Llama
from fastkv.rope import Rope

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

#: `attend(layer, qkv [T, (Hq + 2*Hkv) * D])` -> `[T, Hq, D]`, with RoPE and causality its own.
Attend = Callable[[int, "Array"], "Array"]


def rope(model: Llama, length: int) -> Rope:
    """Rotary tables of the model for positions 0 to length - 1, in the order of GGUF's rows."""
    exponents = np.arange(0, model.rotary_dim, 2) / model.rotary_dim
    frequencies = model.theta**-exponents / model.weights.get("rope_freqs.weight", 1.0)
    angles = np.outer(np.arange(length) / model.position_scale, frequencies)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Rope(cos, sin, interleaved=True)


def rms_norm(x: "Array", weight: "Array", eps: float) -> "Array":
    """RMS norm over the last axis: x `[T, C]`, weight `[C]`."""
    scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))
    normed: Array = x / scale * weight
    return normed


def silu(x: "Array") -> "Array":
    """`x * sigmoid(x)`."""
    with np.errstate(over="ignore"):  # exp of a large -x is inf, and x / inf the right 0
        result: Array = x / (1 + np.exp(-x))
    return result


def hidden_states(
    model: Llama, ids: "NDArray[np.int64]", attend: Attend, dtype: Any = np.float32
) -> "Array":
    """Run the layers over tokens `ids [T]`; returns the normed hidden states `[T, C]`.

    Args:
        model: the weights.
        ids: tokens that follow what `attend` has cached.
        attend: the attention, called once a layer in order.
        dtype: what everything but the attention is computed in.
    """
    x = model.weights["token_embd.weight"][ids].astype(dtype)
    for index in range(model.num_layers):
        w = model.layer(index, dtype)
        h = rms_norm(x, w["attn_norm"], model.eps)
        qkv = np.concatenate([h @ w[f"attn_{name}"].T for name in "qkv"], axis=-1)
        x = x + attend(index, qkv).reshape(len(ids), -1) @ w["attn_output"].T
        h = rms_norm(x, w["ffn_norm"], model.eps)
        x = x + (silu(h @ w["ffn_gate"].T) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    return rms_norm(x, model.weights["output_norm.weight"].astype(dtype), model.eps)


def logits(model: Llama, hidden: "Array") -> "Array":
    """Next-token logits `[T, vocabulary]`."""
    scores: Array = hidden @ model.output.T
    return scores
