# SPDX-License-Identifier: Apache-2.0
"""The decoder over fastkv's cache is the plain float64 decoder, chunk by chunk."""

import numpy as np
import pytest

from fastkv.eval.serve import PAGE_SIZE, Session, eval_spec
from helpers import plain_llama

MODELS = {
    "plain": {},
    "one head per KV head": {"heads": (2, 2)},
    "nine heads of three": {"heads": (9, 3), "dim": 32},
    "untied output": {"tied": False},
    "partial rotary": {"rotary": 8},
    "rope_freqs": {"frequencies": True},
    "linear scaling": {"position_scale": 4.0},
}
LENGTH = 2 * PAGE_SIZE + 13


def served(session, ids, sizes):
    """The logits of all tokens, in chunks of the given sizes over and over."""
    parts, at = [], 0
    while at < len(ids):
        size = sizes[len(parts) % len(sizes)]
        parts.append(session.logits(ids[at : at + size]))
        at += size
    return np.concatenate(parts)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("sizes", [(LENGTH,), (50,), (1, 7, 40)], ids=str)
def test_logits_over_a_float32_cache_are_the_plain_decoders(options, sizes):
    rng = np.random.default_rng(3)
    model = plain_llama.random_llama(rng, **options)
    ids = rng.integers(0, 97, LENGTH)
    got = served(Session(model, eval_spec(model, "none"), {}, LENGTH), ids, sizes)
    want = plain_llama.logits(model, ids)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("backend", ["append", "flash", "flash_mask"])
def test_every_backend_serves_the_same_over_a_float32_cache(backend):
    rng = np.random.default_rng(4)
    model = plain_llama.random_llama(rng)
    ids = rng.integers(0, 97, LENGTH)
    session = Session(model, eval_spec(model, "none"), {}, LENGTH, backend)
    want = plain_llama.logits(model, ids)
    got = served(session, ids, (33,))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_append_reads_even_the_newest_key_from_the_cache():
    rng = np.random.default_rng(5)
    model = plain_llama.random_llama(rng)
    ids = rng.integers(0, 97, 40)
    logits = {}
    for backend in ("append", "flash"):
        spec = eval_spec(model, "block_wise_fp8")
        logits[backend] = Session(model, spec, {}, 40, backend).logits(ids)
    exact = plain_llama.logits(model, ids)
    off = {name: np.abs(x - exact).max() for name, x in logits.items()}
    # One chunk: flash attends to exact K and V throughout, append to none.
    assert off["flash"] < 1e-3
    assert off["append"] > 1e-2


def test_silu_of_a_very_negative_number_is_zero_without_a_warning():
    from fastkv.eval.decoder import silu

    got = silu(np.array([-1e4, -1.0, 0.0, 3.0], np.float32))
    np.testing.assert_allclose(got, [0, -0.26894142, 0, 2.8577223], rtol=1e-6)
