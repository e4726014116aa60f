# SPDX-License-Identifier: Apache-2.0
"""K moved to later positions, against RoPE at these positions."""

import numpy as np
import pytest

from fastkv.calibrate.gguf import move, observe_llama, starts
from fastkv.calibrate.observe import Observer
from fastkv.eval.decoder import rope
from helpers import plain_llama


@pytest.mark.parametrize(
    ("length", "positions", "want"),
    [
        (8, 8, []),
        (8, 3, []),
        (8, 9, [1]),
        (8, 12, [4]),
        (8, 16, [8]),
        (8, 17, [8, 9]),
        (8, 30, [8, 16, 22]),
    ],
)
def test_the_copies_cover_every_position_and_none_beyond(length, positions, want):
    assert starts(length, positions) == want
    covered = {start + i for start in [0, *want] for i in range(length)}
    assert covered == set(range(max(length, positions)))


@pytest.mark.parametrize("rotary", [16, 8])
def test_moved_k_is_k_rotated_at_the_later_position(rotary):
    rng = np.random.default_rng()
    model = plain_llama.random_llama(rng, rotary=rotary)
    raw = rng.standard_normal((20, 2, 16))
    behind = np.concatenate([np.zeros((13, 2, 16)), raw])
    at_home = plain_llama.rotate(model, model.weights, raw)
    later = plain_llama.rotate(model, model.weights, behind)[13:]
    moved = move(at_home.astype(np.float32), rope(model, 40), 13)
    np.testing.assert_allclose(moved[1:], later[1:], rtol=1e-4, atol=1e-5)
    assert np.array_equal(moved[0], at_home[0].astype(np.float32))


def test_positions_widen_k_and_leave_v_alone():
    rng = np.random.default_rng()
    model = plain_llama.random_llama(rng)
    ids = rng.integers(0, 97, 30)
    near, far = Observer(3, by_attention=True), Observer(3, by_attention=True)
    observe_llama(model, [ids], near)
    observe_llama(model, [ids], far, positions=75)
    for layer in range(3):
        (k, v), (far_k, far_v) = near.sides(layer), far.sides(layer)
        assert np.all(far_k.low <= k.low)
        assert np.all(far_k.high >= k.high)
        assert np.any(far_k.high > 1.05 * k.high)
        assert np.array_equal(far_v.histogram.mass, v.histogram.mass)
        total = 3 * k.histogram.mass.sum(axis=1)  # twice more
        np.testing.assert_allclose(far_k.histogram.mass.sum(axis=1), total, rtol=1e-9)
