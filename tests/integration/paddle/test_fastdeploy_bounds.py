# SPDX-License-Identifier: Apache-2.0
"""FastDeploy's backends over fastkv give float64 attention's answer, as well as a format allows.

Attention in float64 over K and V that nobody quantized; the bound is the error that the format's
step predicts (`fastkv.demo.truth`), with the demo's margin.
"""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from fastkv.demo.measure import SAFETY
from fastkv.demo.truth import Truth, expected_square
from fastkv.quant import QUANT_SPECS
from helpers import oracle
from helpers.fastdeploy_engine import Engine, Interleaved
from helpers.sentinels import FORMATS

#: Prefill, prefill over a prefix, decode and draft tokens, in turn.
STEPS = (
    Interleaved(prefill=((0, 40), (2, 9))),
    Interleaved(decode=((0, 1),), prefill=((1, 50), (2, 30))),
    Interleaved(decode=((0, 2), (1, 1)), prefill=((2, 20), (3, 33))),
    Interleaved(decode=((2, 1), (0, 3), (3, 1), (1, 2))),
)


class Recorded(Engine):
    """Keeps every token's exact Q, K and V, its output, and how many keys it read quantized."""

    heads, query_heads, dim, page = 2, 6, 32, 16

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.tokens_of = defaultdict(list)

    def _static(self):
        found = super()._static()
        if found is None:
            return None
        quants = {side: getattr(found, f"{side}_quant") for side in "kv"}
        inverse = {
            f"{side}_dequant": (1 / quant.astype(np.float32)).astype(quant.dtype)
            for side, quant in quants.items()
        }
        return replace(found, **inverse)

    def meta(self, step, number=0, mask_offsets=None):
        self.turn = iter(step.entries)
        return super().meta(step, number, mask_offsets)

    def _rotate(self, heads, cached):
        self.request = next(self.turn)[0]
        return super()._rotate(heads, cached)

    def _check_rows(self, out, q, k, v, held, intervals, exact, seen):
        length = len(held["k"])
        quantized = np.full(len(q), length - len(q) if exact else length)
        self.tokens_of[self.request].append((q, k, v, oracle.values_of(out), quantized))
        super()._check_rows(out, q, k, v, held, intervals, exact, seen)


def truth_of(q, k, v):
    """Causal attention of one request, and its weights, for the prediction."""
    length, heads, dim = k.shape
    mask = oracle.visible_mask(length, length, True)
    out, lse = oracle.attention(q, k, v, mask, dim**-0.5)
    grouped = q.reshape(length, heads, -1, dim)
    scores = np.einsum("ihgd,jhd->hgij", grouped, k) * dim**-0.5
    weights = np.exp(scores - lse.reshape(length, heads, -1).transpose(1, 2, 0)[..., None])
    return Truth(grouped, k, v, np.where(mask, weights, 0), out.reshape(grouped.shape))


def test_the_steps_hold_every_kind_of_request():
    kinds = [[step.is_decode(b) for b in range(len(step.entries))] for step in STEPS]
    assert kinds[2] == [False, True, False, True]
    assert max(entry[1] for step in STEPS for entry in step.decode) == 3


@pytest.mark.parametrize("backend", ["append", "flash_mask"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_answer_is_within_the_formats_bound(backend, fmt):
    engine = Recorded(np.random.default_rng(30), backend, fmt)
    engine.run(STEPS)
    square = predicted = 0.0
    for parts in engine.tokens_of.values():
        q, k, v, out, quantized = (np.concatenate(part) for part in zip(*parts, strict=True))
        exact = truth_of(q, k, v)
        square += ((out.reshape(exact.out.shape) - exact.out) ** 2).sum()
        predicted += expected_square(exact, QUANT_SPECS[fmt], engine.static, quantized).sum()
    assert square > 0
    assert np.sqrt(square) <= SAFETY * np.sqrt(predicted)
    assert np.sqrt(predicted) <= SAFETY * np.sqrt(square), "the bound is that of the format"
