# SPDX-License-Identifier: Apache-2.0
"""How much an error in one token's K or V reaches a layer's output.

With `p[i, t]` the attention of query row i to token t, `o[i]` its output and e the error:

- V: `o[i]` moves by `sum_t p[i, t] * e[t]`. Errors of different tokens are as good as independent,
  so the square of that is `sum_t p[i, t]^2 * e[t]^2` on average: V's weight is `sum_i p[i, t]^2`.
- K: the logit moves by `scale * q[i] . e[t]`, and `o[i]` by that times `p[i, t] * (v[t] - o[i])`
  (the softmax's derivative). K's weight is `sum_i p[i, t]^2 * |v[t] - o[i]|^2 * |q[i]|^2`; the
  softmax scale is the same for all tokens and left out.

Sums go over all query heads of a KV head. A sink token (Xiao et al., arXiv:2309.17453) so weighs
what it should: much in K, whatever its rare values, and little in V's small ones.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]
    F64 = NDArray[np.float64]

# Query rows whose attention to all tokens is held at once: 256 x 2048 in float32 are 2 MB.
_ROWS = 256


def attention_weights(
    q: "F32", k: "F32", v: "F32", scale: float, window: int | None = None
) -> "tuple[F64, F64]":
    """Weights of each token's K and V, `[T, Hkv]` each, float64.

    Args:
        q: queries after RoPE, `[T, Hq, D]`, of the whole sequence: attention is causal.
        k: keys after RoPE, `[T, Hkv, D]`.
        v: values, `[T, Hkv, D]`.
        scale: multiplies the logits.
        window: newest keys that a row sees, its own among them; None: all.
    """
    of_k, of_v = np.zeros(k.shape[:2]), np.zeros(k.shape[:2])
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        kv = head // group
        for start in range(0, len(q), _ROWS):
            rows = slice(start, min(start + _ROWS, len(q)))
            seen = slice(0 if window is None else max(0, start - window + 1), rows.stop)
            p = _probabilities(q[rows, head], k[seen, kv], rows.start - seen.start, scale, window)
            values = v[seen, kv]
            of_v[seen, kv] += np.square(p).sum(axis=0)
            of_k[seen, kv] += _on_keys(p, values, q[rows, head])
    return of_k, of_v


def _probabilities(
    q: "F32", k: "F32", offset: int, scale: float, window: int | None
) -> "NDArray[Any]":
    """Softmax over the keys that each row sees, `[rows, keys]`; row i is key `offset + i`."""
    distance = np.arange(len(q))[:, None] + offset - np.arange(len(k))
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    logits = np.where(seen, q @ k.T * np.float32(scale), -np.inf)
    p: NDArray[Any] = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p


def _on_keys(p: "NDArray[Any]", v: "F32", q: "F32") -> "NDArray[Any]":
    """`sum_i p[i, t]^2 * |v[t] - o[i]|^2 * |q[i]|^2` of one block of rows, `[keys]`."""
    out = p @ v
    apart = np.square(v).sum(axis=1) - 2 * out @ v.T + np.square(out).sum(axis=1)[:, None]
    reach = np.maximum(apart, 0) * np.square(q).sum(axis=1)[:, None]
    found: NDArray[Any] = (np.square(p) * reach).sum(axis=0)
    return found
