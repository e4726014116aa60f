# SPDX-License-Identifier: Apache-2.0
"""The observer, and the decoder that feeds it: against K and V of a plain Llama in float64."""

import numpy as np
import pytest

from fastkv import CacheSpec
from fastkv.calibrate.gguf import observe_llama, split_halves
from fastkv.calibrate.methods import Recipe
from fastkv.calibrate.observe import Observer
from fastkv.calibrate.report import ranges
from fastkv.calibrate.source import cut
from fastkv.errors import MissingTensorError, ScaleError, ShapeError
from fastkv.quant import QUANT_SPECS
from fastkv.scales.calibration import calibrate
from helpers import plain_llama

STATIC = [row for row in QUANT_SPECS.values() if row.needs_static]


class Kept(Observer):
    """Also keeps what it is handed."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = {}

    def add(self, layer, q, k, v, scale, window=None, later=()):
        super().add(layer, q, k, v, scale, window, later)
        self.seen.setdefault(layer, []).append((q, k, v, scale))


def activations(rng, n, heads=2, dim=4):
    q = rng.standard_normal((n, 2 * heads, dim)).astype(np.float32)
    k, v = rng.standard_normal((2, n, heads, dim)).astype(np.float32) * 3
    return q, k, v


@pytest.fixture
def model():
    return plain_llama.random_llama(np.random.default_rng(3), rotary=12)


def of_first_layer(model, ids):
    w = {name: value.astype(np.float64) for name, value in model.weights.items()}
    own = {n.split(".")[2]: v for n, v in w.items() if n.startswith("blk.0.")}
    x = plain_llama.norm(w["token_embd.weight"][ids], own["attn_norm"], model.eps)
    return plain_llama.keys_and_values(model, w, own, x)


def test_the_decoder_hands_over_k_after_rope_and_v_of_every_sequence(model):
    rng = np.random.default_rng()
    ids = rng.integers(0, 97, 300)
    observer = Kept(3)
    sequences = cut(ids, 130, bos=7)
    observe_llama(model, sequences, observer)
    assert [len(s) for s in sequences] == [131, 131, 41]
    assert sorted(observer.seen) == [0, 1, 2]
    for (_, k, v, scale), sequence in zip(observer.seen[0], sequences, strict=True):
        assert sequence[0] == 7
        want_k, want_v = of_first_layer(model, sequence)
        np.testing.assert_allclose(k, want_k, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(v, want_v, rtol=1e-4, atol=1e-4)
        assert scale == pytest.approx(model.head_dim**-0.5)


def test_the_layers_behind_are_those_of_the_whole_model(model):
    """The last layer's K depends on every attention before it."""
    ids = np.random.default_rng().integers(0, 97, 70)
    observer = Kept(3)
    observe_llama(model, [ids], observer)
    seen = []

    def recorded(model, w, own, h, of=plain_llama.keys_and_values):
        seen.append(of(model, w, own, h))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_llama, "keys_and_values", recorded)
        plain_llama.logits(model, ids)
    for layer, (k, v) in enumerate(seen):
        np.testing.assert_allclose(observer.seen[layer][0][1], k, rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(observer.seen[layer][0][2], v, rtol=1e-3, atol=2e-3)


def test_split_halves_is_the_order_in_which_rope_rotates_halves(model):
    """Reordered before RoPE and rotated in halves, or rotated as neighbours and reordered."""
    rng = np.random.default_rng()
    x = rng.standard_normal((5, 2, 16)).astype(np.float32)
    angle = rng.uniform(0, 6, (5, 1, 6))
    pairs = x[..., 0:12:2] + 1j * x[..., 1:12:2]
    turned = pairs * np.exp(1j * angle)
    neighbours = x.copy()
    neighbours[..., 0:12:2], neighbours[..., 1:12:2] = turned.real, turned.imag
    y = split_halves(x, 12)
    first, second = y[..., :6], y[..., 6:12]
    halves = np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            first * np.sin(angle) + second * np.cos(angle),
            y[..., 12:],
        ],
        axis=-1,
    )
    np.testing.assert_allclose(split_halves(neighbours, 12), halves, rtol=1e-5, atol=1e-6)


def test_scales_in_split_halves_are_the_interleaved_ones_reordered(model):
    ids = np.random.default_rng().integers(0, 97, 60)
    row = QUANT_SPECS["cache_int4_zp"]
    found = []
    for interleaved in (True, False):
        observer = Observer(3, by_attention=True)
        observe_llama(model, [ids], observer, interleaved=interleaved)
        found.append(observer.scales(row, None, Recipe("mse", weights="attention")))
    for layer in range(3):
        neighbours, halves = found[0][layer], found[1][layer]
        want = split_halves(neighbours.k_dequant, 12)
        np.testing.assert_allclose(halves.k_dequant, want, rtol=1e-5)
        assert not np.allclose(halves.k_dequant, neighbours.k_dequant)
        assert np.array_equal(halves.v_dequant, neighbours.v_dequant)


@pytest.mark.parametrize("row", STATIC, ids=lambda row: row.name)
@pytest.mark.parametrize("headroom", [1.0, 1.5])
def test_minmax_of_a_stream_is_calibrate_on_the_whole(row, headroom):
    rng = np.random.default_rng()
    q, k, v = activations(rng, 90)
    observer = Observer(1)
    for part in np.split(np.arange(90), [20, 21, 60]):
        observer.add(0, q[part], k[part], v[part], 1.0)
    for layout in row.granularities:
        found = observer.scales(row, layout, Recipe(headroom=headroom))[0]
        want = calibrate(k, v, row, granularity=layout, headroom=headroom)
        for name in ("k_quant", "k_dequant", "v_quant", "v_dequant", "k_zp", "v_zp"):
            got, expected = getattr(found, name), getattr(want, name)
            assert (got is None) is (expected is None)
            if got is not None:
                assert np.array_equal(got, expected), name
        assert found.validate(CacheSpec(1, 2, 4, 16, row.name)) == ()


def test_memory_does_not_grow_with_the_text():
    rng = np.random.default_rng()
    observer = Observer(2)
    sizes = set()
    for _ in range(5):
        for layer in (0, 1):
            observer.add(layer, *activations(rng, 200), 1.0)
        sides = [side for layer in (0, 1) for side in observer.sides(layer)]
        sizes.add(sum(s.histogram.mass.nbytes + s.low.nbytes + s.high.nbytes for s in sides))
    assert len(sizes) == 1
    assert sum(s.histogram.mass.sum() for s in sides) == 5 * 200 * 2 * 2 * 8


def test_weights_reach_the_histograms_of_k_and_of_v():
    from fastkv.calibrate.weights import attention_weights

    q, k, v = activations(np.random.default_rng(), 50)
    observer = Observer(1, by_attention=True)
    observer.add(0, q, k, v, 0.5, window=9)
    weights = attention_weights(q, k, v, 0.5, 9)
    for side, of, other in zip(observer.sides(0), weights, weights[::-1], strict=True):
        mass = side.histogram.mass.reshape(2, 4, -1).sum(-1)
        np.testing.assert_allclose(mass, np.tile(of.sum(0)[:, None], 4), rtol=1e-9)
        assert not np.allclose(mass[:, 0], other.sum(0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["K", "V"])
def test_a_value_that_is_not_finite_is_named_with_its_place(value, side):
    q, k, v = activations(np.random.default_rng(), 9)
    (k if side == "K" else v)[4, 1, 2] = value
    says = rf"{side} of layer 1: expected finite values, got -?(nan|inf) at token 4, head 1, ch.* 2"
    with pytest.raises(ScaleError, match=says):
        Observer(2).add(1, q, k, v, 1.0)


def test_a_layer_that_was_not_observed_is_named():
    observer = Observer(4)
    observer.add(2, *activations(np.random.default_rng(), 9), 1.0)
    with pytest.raises(MissingTensorError, match=r"layers 0, 1, 3: expected K and V of all 4"):
        observer.scales(QUANT_SPECS["cache_int8"], None, Recipe())


def test_shapes_that_differ_are_refused():
    rng = np.random.default_rng()
    q, k, v = activations(rng, 9)
    observer = Observer(2)
    observer.add(0, q, k, v, 1.0)
    with pytest.raises(ShapeError, match="K and V of layer 1"):
        observer.add(1, *activations(rng, 9, heads=1), 1.0)
    with pytest.raises(ShapeError, match=r"got \[9, 2, 4\] and \[8, 2, 4\]"):
        observer.add(1, q, k, v[1:], 1.0)
    with pytest.raises(ShapeError, match="expected a layer below 2, got 2"):
        observer.add(2, q, k, v, 1.0)


def test_every_layer_is_announced():
    told = []
    observer = Observer(2, done=told.append)
    for layer in (0, 1):
        observer.add(layer, *activations(np.random.default_rng(), 9), 1.0)
    observer.scales(QUANT_SPECS["cache_fp8"], None, Recipe(), told.append)
    assert told == [f"{what} layer {i}" for what in ("observe", "scales of") for i in (0, 1)]


def test_covered_is_the_larger_end_of_what_the_codes_reach():
    observer, row = Observer(1), QUANT_SPECS["cache_int4_zp"]
    q, k, v = activations(np.random.default_rng(5), 50)
    k, v = -np.abs(k) - 1, np.abs(v) + 1  # the larger end is the lowest code's in K alone
    observer.add(0, q, k, v, 1.0)
    scales = observer.scales(row, None, Recipe())
    found = ranges(observer, scales, row)
    for side, x in (("k", k), ("v", v)):
        np.testing.assert_allclose(found[side].covered[0], np.abs(x).max(axis=(0, 2)), rtol=0.1)
        np.testing.assert_array_equal(found[side].amax[0], np.abs(x).max(axis=(0, 2)))
