# SPDX-License-Identifier: Apache-2.0
"""A Llama decoder in float64 that shares nothing with fastkv, and tiny random models for it.

The whole sequence at once, one head after another, RoPE as a product of complex numbers.
"""

import numpy as np

from fastkv.eval.gguf_llama import Llama


def logits(model, ids):
    """Next-token logits `[T, vocabulary]` of a whole sequence."""
    w = {name: value.astype(np.float64) for name, value in model.weights.items()}
    x = w["token_embd.weight"][ids]
    for i in range(model.num_layers):
        own = {n.split(".")[2]: v for n, v in w.items() if n.startswith(f"blk.{i}.")}
        x = x + attention(model, w, own, norm(x, own["attn_norm"], model.eps))
        h = norm(x, own["ffn_norm"], model.eps)
        gate = h @ own["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ own["ffn_up"].T)) @ own["ffn_down"].T
    x = norm(x, w["output_norm.weight"], model.eps)
    return x @ w.get("output.weight", w["token_embd.weight"]).T


def norm(x, weight, eps):
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def attention(model, w, own, h):
    length, dim = len(h), model.head_dim
    k, v = keys_and_values(model, w, own, h)
    q = (h @ own["attn_q"].T).reshape(length, model.num_q_heads, dim)
    q = rotate(model, w, q)
    rows = []
    for head in range(model.num_q_heads):
        kv = head // (model.num_q_heads // model.num_kv_heads)
        scores = q[:, head] @ k[:, kv].T / np.sqrt(dim)
        scores[np.triu_indices(length, 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        rows.append(weights @ v[:, kv] / weights.sum(-1, keepdims=True))
    return np.concatenate(rows, -1) @ own["attn_output"].T


def keys_and_values(model, w, own, h):
    shape = (len(h), model.num_kv_heads, model.head_dim)
    k, v = ((h @ own[f"attn_{side}"].T).reshape(shape) for side in "kv")
    return rotate(model, w, k), v


def rotate(model, w, x):
    """Pairs of neighbouring channels as complex numbers, turned by position / theta ** (2j/R)."""
    half = model.rotary_dim // 2
    speed = model.theta ** (-np.arange(half) / half) / w.get("rope_freqs.weight", np.ones(half))
    turn = np.exp(1j * np.arange(len(x))[:, None] / model.position_scale * speed)[:, None]
    pairs = (x[..., 0 : 2 * half : 2] + 1j * x[..., 1 : 2 * half : 2]) * turn
    rotated = x.copy()
    rotated[..., 0 : 2 * half : 2], rotated[..., 1 : 2 * half : 2] = pairs.real, pairs.imag
    return rotated


def random_llama(
    rng,
    *,
    layers=3,
    heads=(6, 2),
    dim=16,
    rotary=None,
    hidden=48,
    ffn=40,
    vocabulary=97,
    tied=True,
    frequencies=False,
    position_scale=1.0,
):
    """A Llama with random weights, large enough that attention matters."""

    def matrix(rows, columns):
        return (rng.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns)).astype(np.float32)

    def gain():
        return rng.uniform(0.5, 1.5, hidden).astype(np.float32)

    q, kv = (count * dim for count in heads)
    weights = {"token_embd.weight": matrix(vocabulary, hidden) * 4, "output_norm.weight": gain()}
    if not tied:
        weights["output.weight"] = matrix(vocabulary, hidden)
    rotary = dim if rotary is None else rotary
    if frequencies:
        weights["rope_freqs.weight"] = rng.uniform(1, 8, rotary // 2).astype(np.float32)
    shapes = {"attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
    shapes |= {"attn_output": (hidden, q), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden)}
    shapes |= {"ffn_down": (hidden, ffn)}
    for i in range(layers):
        weights |= {f"blk.{i}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        weights |= {f"blk.{i}.{name}_norm.weight": gain() for name in ("attn", "ffn")}
    return Llama(
        weights, layers, *heads, dim, rotary, theta=5000.0, eps=1e-5, position_scale=position_scale
    )
