# SPDX-License-Identifier: Apache-2.0
"""`forward_mixed` end to end on the reference, step after step, against float64."""

from dataclasses import replace

import numpy as np
import pytest

from fastkv.backends import BACKEND_NAMES
from fastkv.errors import ContractError
from helpers.compare import assert_same_bits, bits
from helpers.mixed import EXACT_PREFILL, MIXTURE, Engine, Step
from helpers.sentinels import FORMATS

every_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
every_format = pytest.mark.parametrize("fmt", FORMATS)


def test_the_mixture_is_one():
    """Every kind of request at some step, together with the others."""
    kinds, lengths, together = set(), [0] * 6, 0
    for step in MIXTURE:
        before = len(kinds)
        in_step = set()
        for entries, kind in ((step.decode, "decode"), (step.prefill, "prefill")):
            for request, new, *kept in entries:
                name = "drafts" if kind == "decode" and new > 1 else kind
                in_step.add((name if new else f"empty {kind}", lengths[request] > 0))
                lengths[request] += kept[0] if kept else new
        kinds |= in_step
        together = max(together, len(in_step))
        assert before <= len(kinds)
    assert kinds >= {
        ("prefill", False),
        ("prefill", True),
        ("decode", True),
        ("drafts", True),
        ("empty prefill", False),
        ("empty prefill", True),
        ("empty decode", False),
        ("empty decode", True),
    }
    assert together >= 5


@every_backend
@every_format
@pytest.mark.parametrize("rotated", [False, True], ids=["as-it-is", "norm-and-rope"])
def test_mixture(backend, fmt, rotated):
    engine = Engine(np.random.default_rng(7), backend, fmt, rotated=rotated)
    seen = engine.run(MIXTURE)
    assert seen.rows == sum(entry[1] for step in MIXTURE for entry in step.entries)
    # The comparison can tell exact new tokens from what the cache holds of them.
    assert (seen.exact > 10) == EXACT_PREFILL[backend]


@every_backend
@every_format
def test_norm_after_rope(backend, fmt):
    engine = Engine(np.random.default_rng(8), backend, fmt, norm_after_rope=True)
    assert engine.run(MIXTURE[:3]).rows == 7 + 5 + 4 + 9 + 6 + 3 + 4 + 3 + 2 + 1


@every_backend
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", ["none", "cache_int8", "block_wise_fp8"])
def test_half_precision(backend, fmt, dtype):
    engine = Engine(np.random.default_rng(9), backend, fmt, dtype=dtype)
    assert engine.run(MIXTURE).rows


@every_backend
@every_format
def test_not_causal_with_its_own_scale(backend, fmt):
    engine = Engine(np.random.default_rng(10), backend, fmt, causal=False, softmax_scale=0.41)
    assert engine.run(MIXTURE).changed > 10


@every_backend
@every_format
def test_a_batch_of_nothing(backend, fmt):
    engine = Engine(np.random.default_rng(11), backend, fmt)
    before = [bits(cache) for cache in engine.caches]
    for step in (Step(), Step(prefill=((0, 0),)), Step(decode=((0, 0), (1, 0)), prefill=((2, 0),))):
        out = engine.backend.forward_mixed(engine.tokens(step), engine.layer, engine.meta(step))
        assert out.shape == (2, 6, 16)
        assert not out.any()
    for cache, want in zip(engine.caches, before, strict=True):
        assert_same_bits(cache, want)


@every_backend
@every_format
def test_num_decode_may_count_prefill_requests_too(backend, fmt):
    # All rows over the pages: the same numbers as the append backend.
    outs = []
    for name in (backend, "append"):
        engine = Engine(np.random.default_rng(12), name, fmt)
        step = Step(decode=((0, 5), (1, 9)))
        outs.append(engine.run([step, Step(decode=((1, 3), (0, 1)))]).outs)
    for got, want in zip(*outs, strict=True):
        assert_same_bits(got, want)


@every_backend
@every_format
def test_a_host_integer_may_be_numpys(backend, fmt):
    outs = []
    for kind in (int, np.int64):
        engine = Engine(np.random.default_rng(13), backend, fmt)
        engine.run(MIXTURE[:1])
        step = MIXTURE[1]
        qkv, meta = engine.tokens(step), engine.meta(step)
        meta = replace(meta, num_decode=kind(meta.num_decode), total_k=kind(meta.total_k))
        outs.append(engine.backend.forward_mixed(qkv, engine.layer, meta))
    assert_same_bits(*outs)


@every_backend
@every_format
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("block_table", lambda table: np.where(table >= 0, np.int32(99), table)),
        ("cache_seqlens", lambda lengths: lengths + np.int32(24)),
        ("cu_seqlens_q", lambda sums: sums[::-1].copy()),
        ("cu_seqlens_q", lambda sums: sums.astype(np.int64)),
        ("block_table", lambda table: table[:-1]),
        ("block_table", lambda table: table.astype(np.float32)),
    ],
    ids=["page", "length", "decreasing", "int64", "shape", "float"],
)
def test_bad_batches_write_nothing(backend, fmt, name, change):
    engine = Engine(np.random.default_rng(14), backend, fmt)
    engine.run(MIXTURE[:1])
    step = MIXTURE[1]
    qkv, meta = engine.tokens(step), engine.meta(step)
    meta = replace(meta, **{name: change(getattr(meta, name))})
    before = [bits(cache) for cache in engine.caches]
    with pytest.raises(ContractError, match=name):
        engine.backend.forward_mixed(qkv, engine.layer, meta)
    for cache, want in zip(engine.caches, before, strict=True):
        assert_same_bits(cache, want)
