# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from fastkv.eval.score import Score, log_softmax


def probabilities(logits):
    """Softmax of one row in Python's own floats."""
    top = max(map(float, logits))
    powers = [math.exp(float(x) - top) for x in logits]
    return [x / math.fsum(powers) for x in powers]


@pytest.fixture
def logits():
    rng = np.random.default_rng(7)
    exact = (rng.standard_normal((150, 33)) * 3).astype(np.float32)
    off = exact + (rng.standard_normal(exact.shape) * 0.8).astype(np.float32)
    return exact, off, rng.integers(0, 33, 150)


def test_score_adds_up_perplexity_kl_and_agreement(logits):
    exact, off, targets = logits
    score = Score()
    score.add(exact[:100], off[:100], targets[:100])
    score.add(exact[100:], off[100:], targets[100:149])  # the last row has no next token
    nll, kl, agreed = [], [], 0
    for p, q, target in zip(exact[:149], off[:149], targets[:149], strict=True):
        p_row, q_row = probabilities(p), probabilities(q)
        nll.append(-math.log(q_row[target]))
        kl.append(math.fsum(a * math.log(a / b) for a, b in zip(p_row, q_row, strict=True)))
        agreed += p_row.index(max(p_row)) == q_row.index(max(q_row))
    assert score.rows == 149
    assert score.perplexity == pytest.approx(math.exp(math.fsum(nll) / 149), rel=1e-12)
    assert score.mean_kl == pytest.approx(math.fsum(kl) / 149, rel=1e-9)
    assert score.top1 == agreed / 149
    assert 0 < agreed < 149


def test_kl_of_a_distribution_from_itself_is_exactly_zero(logits):
    score = Score()
    score.add(logits[0], logits[0], logits[2])
    assert score.mean_kl == 0
    assert score.top1 == 1


def test_a_score_of_nothing_is_nan():
    score = Score()
    assert all(math.isnan(x) for x in (score.perplexity, score.mean_kl, score.top1))


def test_log_softmax_does_not_overflow():
    got = log_softmax(np.array([[3e38, 0, 3e38]], np.float32))
    np.testing.assert_allclose(np.exp(got), [[0.5, 0, 0.5]])
