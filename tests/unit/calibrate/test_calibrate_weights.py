# SPDX-License-Identifier: Apache-2.0
"""Attention weights against sums written out, and against what an error really does."""

import numpy as np
import pytest

from fastkv.calibrate import weights as module
from fastkv.calibrate.weights import attention_weights

SCALE = 0.3


def attend(q, k, v, window=None):
    """Causal attention in float64, row by row: p `[Hq, T, T]` and out `[Hq, T, D]`."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    length, heads = q.shape[:2]
    group = heads // k.shape[1]
    p = np.zeros((heads, length, length))
    for head in range(heads):
        for i in range(length):
            first = 0 if window is None else max(0, i - window + 1)
            logits = SCALE * k[first : i + 1, head // group] @ q[i, head]
            e = np.exp(logits - logits.max())
            p[head, i, first : i + 1] = e / e.sum()
    out = np.stack([p[h] @ v[:, h // group] for h in range(heads)])
    return p, out


@pytest.fixture
def qkv():
    rng = np.random.default_rng()
    q = rng.standard_normal((23, 6, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 23, 2, 8)).astype(np.float32)
    return 2 * q, 2 * k, v


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("rows", [256, 7])
def test_weights_are_the_sums_of_the_docstring(qkv, monkeypatch, window, rows):
    monkeypatch.setattr(module, "_ROWS", rows)
    q, k, v = qkv
    p, out = attend(q, k, v, window)
    want_k, want_v = np.zeros((2, 23, 2))
    for head in range(6):
        kv = head // 3
        for i in range(23):
            for t in range(i + 1):
                square = p[head, i, t] ** 2
                apart = ((v[t, kv] - out[head, i]) ** 2).sum()
                want_v[t, kv] += square
                want_k[t, kv] += square * apart * (q[i, head].astype(np.float64) ** 2).sum()
    of_k, of_v = attention_weights(q, k, v, SCALE, window)
    np.testing.assert_allclose(of_v, want_v, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(of_k, want_k, rtol=1e-3, atol=2e-3)  # v - o cancels


def test_they_rank_tokens_by_what_an_error_does_to_the_output(qkv):
    """Move one token's V, or K, at random: the output's mean square follows the weights."""
    q, k, v = qkv
    rng = np.random.default_rng(5)
    _, before = attend(q, k, v)
    of_k, of_v = attention_weights(q, k, v, SCALE)
    for index, weights in ((1, of_k), (2, of_v)):
        effect = np.zeros(23)
        for t in range(23):
            for _ in range(20):
                moved = [q, k.astype(np.float64), v.astype(np.float64)]
                moved[index][t, 0] += 1e-3 * rng.standard_normal(8)
                effect[t] += ((attend(*moved)[1][:3] - before[:3]) ** 2).sum()
        assert np.corrcoef(np.log(effect[:20]), np.log(weights[:20, 0]))[0, 1] > 0.9
