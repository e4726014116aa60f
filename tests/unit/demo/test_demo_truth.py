# SPDX-License-Identifier: Apache-2.0
"""The demo's float64 attention, against one written out in loops, and its prediction."""

import numpy as np
import pytest

from fastkv.demo.sample import load_sample
from fastkv.demo.schedule import requests
from fastkv.demo.truth import Truth, expected_square, truth
from fastkv.quant import QUANT_SPECS
from fastkv.scales import StaticScales


@pytest.fixture(scope="module")
def sample():
    return load_sample()


def test_sample_is_real_and_before_rope(sample):
    assert (sample.num_q_heads, sample.num_kv_heads, sample.head_dim) == (9, 3, 64)
    assert len(sample.layers) == 3
    for layer in sample.layers:
        assert layer.qkv.shape == (sample.num_tokens, 15 * 64)
        assert np.isfinite(layer.qkv).all()
        assert len(np.unique(layer.qkv[:, 0])) > 100
        assert (layer.k_min < layer.k_max).all()
        assert (layer.v_min < layer.v_max).all()


def test_truth_equals_attention_in_loops(sample):
    request = requests(sample)[3]
    layer = sample.layers[1]
    got = truth(sample, layer, request)
    rows = layer.qkv[request.tokens].astype(np.float64).reshape(-1, 15, 64)

    def rotated(token, head):
        x = rows[token, head]
        z = (x[:32] + 1j * x[32:]) * np.exp(1j * token * 100000.0 ** (-np.arange(32) / 32))
        return np.concatenate([z.real, z.imag])

    for token, head in ((0, 0), (17, 4), (len(rows) - 1, 8)):
        kv = head // 3
        logits = [rotated(token, head) @ rotated(j, 9 + kv) / 8 for j in range(token + 1)]
        p = np.exp(np.array(logits) - max(logits))
        want = sum(p[j] / p.sum() * rows[j, 12 + kv] for j in range(token + 1))
        np.testing.assert_allclose(got.out[token, kv, head % 3], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["cache_int8", "cache_fp8", "cache_int4_zp", "block_wise_fp8"])
def test_predicted_error_is_the_error_of_random_rounding(name):
    """On data without structure, noise of the format's own step gives the predicted error."""
    rng = np.random.default_rng(5)
    length, heads, dim = 40, 2, 16
    q = rng.standard_normal((length, heads, 2, dim))
    k = rng.standard_normal((length, heads, dim)) + 0.5
    v = rng.standard_normal((length, heads, dim)) * 3
    quant = QUANT_SPECS[name]
    static = None
    if quant.needs_static:
        ranges = [f(x, axis=0) for x in (k, v) for f in (np.min, np.max)]
        static = StaticScales.from_minmax(*ranges, name)

    def attend(k, v):
        scores = np.einsum("ihgd,jhd->hgij", q, k) / np.sqrt(dim)
        scores[..., ~np.tri(length, dtype=bool)] = -np.inf
        p = np.exp(scores)
        p /= p.sum(-1, keepdims=True)
        return p, np.einsum("hgij,jhd->ihgd", p, v)

    weights, out = attend(k, v)
    exact = Truth(q, k, v, weights, out)
    all_quantized = np.full(length, length)
    predicted = expected_square(exact, quant, static, all_quantized).sum()
    measured = []
    for _ in range(20):
        noisy = [x + rounding(x, name, static, side, rng) for x, side in ((k, "k"), (v, "v"))]
        measured.append(((attend(*noisy)[1] - out) ** 2).sum())
    assert 0.75 < np.mean(measured) / predicted < 1.3
    none_quantized = expected_square(exact, quant, static, np.zeros(length, int))
    assert none_quantized.sum() == 0


def rounding(x, name, static, side, rng):
    """Uniform noise of one step, from each format's definition."""
    if name == "cache_int8":
        step = np.asarray(getattr(static, f"{side}_dequant"))[:, None]
    elif name == "cache_int4_zp":
        step = getattr(static, f"{side}_dequant")
    else:
        amax = np.abs(x).max(-1, keepdims=True)
        unit = (
            np.asarray(getattr(static, f"{side}_dequant"))[:, None]
            if name == "cache_fp8"
            else amax / 448
        )
        _, exponent = np.frexp(np.abs(x / unit))  # x = m * 2**exponent with 0.5 <= m < 1
        step = unit * 2.0 ** (np.maximum(exponent - 1, -6) - 3)
    return (rng.random(x.shape) - 0.5) * step
