# SPDX-License-Identifier: Apache-2.0
"""The oracle itself, against facts written by hand and against casts of another library."""

import math

import ml_dtypes
import numpy as np
import pytest

from helpers import oracle

E4M3 = ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize(
    ("byte", "value"),
    [(0x00, 0), (0x01, 2**-9), (0x08, 2**-6), (0x38, 1), (0x7E, 448), (0xFE, -448), (0xB9, -1.125)],
)
def test_e4m3_values(byte, value):
    assert oracle.E4M3[byte] == value


def test_every_e4m3_byte_has_the_value_that_ml_dtypes_gives_it():
    theirs = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
    np.testing.assert_array_equal(oracle.E4M3, theirs)


def test_e4m3_rounding_agrees_with_ml_dtypes_at_values_ties_and_between():
    positive = oracle.E4M3[:127]
    ties = (positive[1:] + positive[:-1]) / 2
    rng = np.random.default_rng(0)
    between = rng.uniform(-448, 448, 20_000) * 2.0 ** rng.integers(-18, 1, 20_000)
    x = np.concatenate([positive, ties, np.nextafter(ties, 0), np.nextafter(ties, 448), between])
    x = np.concatenate([x, -x]).astype(np.float32)
    np.testing.assert_array_equal(oracle.to_e4m3(x), x.astype(E4M3).view(np.uint8))


def test_bfloat16_rounding_agrees_with_ml_dtypes_on_random_bits():
    bits = np.random.default_rng(1).integers(0, 2**32, 50_000, np.uint32)
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    theirs = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(oracle.to_bfloat16_bits(x), theirs)


def test_int4_packs_even_elements_low():
    stored, scale = oracle.quantize(
        "cache_int4_zp", [[[1.0, -1.0, -8.0, 7.0]]], quant=[1.0], zp=np.zeros((1, 4))
    )
    assert scale is None
    assert stored.tolist() == [[[0xF1, 0x78]]]


def test_attention_of_one_visible_key_is_its_value():
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 2, 1, 4))
    out, lse = oracle.attention(q, k, v, [[True, False], [False, False]], 0.5)
    np.testing.assert_allclose(out[0], v[0])
    assert lse[0, 0] == pytest.approx(0.5 * (q[0, 0] @ k[0, 0]))
    assert not out[1].any()
    assert lse[1, 0] == -math.inf


def test_a_sink_halves_one_key_with_an_equal_logit_and_leaves_the_lse():
    ones = np.ones((1, 1, 1))
    out, lse = oracle.attention(ones, ones, 3 * ones, [[True]], 2.0, sinks=[2.0])
    assert out.item() == pytest.approx(1.5)
    assert lse.item() == pytest.approx(2.0)


def test_visible_mask_of_the_last_rows():
    mask = oracle.visible_mask(2, 4, True, window=2, intervals=[(0, 4), (3, 4)])
    assert mask.tolist() == [[False, True, True, False], [False, False, False, True]]
