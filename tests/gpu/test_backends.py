# SPDX-License-Identifier: Apache-2.0
"""`forward_mixed` of each backend on torch's CUDA tensors, step after step, in float64."""

from types import SimpleNamespace

import numpy as np
import pytest

from fastkv.arrays import numpy_dtype
from fastkv.backends import BACKEND_NAMES, get_backend
from fastkv.ops.cuda import jit
from fastkv.quant import quant_spec
from helpers import compare, oracle
from helpers.compare import assert_same_bits, bits
from helpers.mixed import MIXTURE, Engine, Step
from helpers.on_gpu import to_cpu, to_gpu
from helpers.sentinels import FORMATS

every_format = pytest.mark.parametrize("fmt", FORMATS)
every_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)

#: The mixture with three times the tokens, so that requests span pages of 16.
LONGER = tuple(
    Step(
        *(
            tuple((request, *(3 * n for n in counts)) for request, *counts in entries)
            for entries in (step.decode, step.prefill)
        )
    )
    for step in MIXTURE
)


class GpuEngine(Engine):
    """The same engine, its step served on a GPU from copies of the poisoned caches."""

    heads, query_heads, dim, page, rotary = 2, 6, 64, 16, 48

    def __init__(self, rng, backend, fmt, dtype, **options):
        super().__init__(rng, backend, fmt, dtype=dtype, **options)
        device = f"cuda:{jit.device_facts(0).sm}"
        self.backend = get_backend(
            self.spec, name=backend, device=device, num_query_heads=self.query_heads
        )

    def _forward(self, qkv, meta):
        layer = SimpleNamespace(**to_gpu(vars(self.layer), "torch"))
        moved = to_gpu(meta, "torch")
        out = self.backend.forward_mixed(to_gpu(qkv, "torch"), layer, moved)
        for own, cache in zip(self.caches, moved.caches, strict=True):
            own.view(f"u{own.itemsize}")[...] = bits(to_cpu(cache))
        return to_cpu(out)

    def _tolerance(self, q, k, v, want, options):
        """FlashAttention's rule: at most so many times the error of a plain low-precision run.

        Q is rounded to its dtype, and to the cache's where that holds no codes and is read, since
        both are multiplied in it; gathered K and V to qkv's dtype; the weights to bfloat16, the
        coarsest that a kernel multiplies with. Three times, since a step may hold one row: two
        samples of the same error.
        """
        rounded_q = _rounded(q, self.dtype)
        if self.step_exact:
            k, v = _rounded(k, self.dtype), _rounded(v, self.dtype)
        elif quant_spec(self.fmt).storage is None:
            rounded_q = _rounded(rounded_q, self.spec.dtype)
        plain = _low_precision(rounded_q, k, v, self.step_mask, **options)
        unit = compare.ROUNDING[self.dtype]
        return 3 * np.abs(plain - want).max() + 2 * unit * np.abs(want) + 2.0**-12

    def _check_rows(self, out, q, k, v, held, intervals, exact, seen):
        window = getattr(self.layer, "sliding_window", None)
        causal = self.layer.causal
        self.step_mask = oracle.visible_mask(len(q), len(held["k"]), causal, window, intervals)
        self.step_exact = exact
        super()._check_rows(out, q, k, v, held, intervals, exact, seen)


def _rounded(x, dtype):
    """Float64 of values that went through a dtype."""
    return oracle.values_of(x.astype(np.float32).astype(numpy_dtype(dtype)))


def _low_precision(q, k, v, mask, *, scale, soft_cap, sinks):
    """`[n, Hq, D]` in float64 but for the weights, which are rounded to bfloat16."""
    group = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    logits = np.einsum("nhd,lhd->nhl", q, keys) * scale
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    logits = np.where(mask[:, None, :], logits, -np.inf)
    top = np.maximum(logits.max(axis=-1, keepdims=True, initial=-1e30), -1e30)
    weights = oracle.from_bfloat16_bits(oracle.to_bfloat16_bits(np.exp(logits - top)))
    total = weights.sum(axis=-1)
    if sinks is not None:
        with np.errstate(over="ignore"):  # of a row that sees no key
            total = total + np.exp(oracle.values_of(sinks)[None] - top[..., 0])
    seen = mask.any(axis=1)[:, None, None]
    out = np.einsum("nhl,lhd->nhd", weights, np.where(np.isfinite(values), values, 0.0))
    return np.where(seen, out / np.where(total == 0, 1, total)[..., None], 0.0)


@every_backend
@every_format
@pytest.mark.parametrize("rotated", [False, True], ids=["as-it-is", "norm-and-rope"])
def test_mixture(fmt, rotated, backend):
    engine = GpuEngine(np.random.default_rng(7), backend, fmt, "bfloat16", rotated=rotated)
    seen = engine.run(LONGER)
    assert seen.rows == sum(entry[1] for step in LONGER for entry in step.entries)


# Steps that come with intervals: flash takes none on prefill rows.
MASKED = {
    "append": lambda step: len(step.prefill) != 3,
    "flash_mask": lambda step: len(step.prefill) != 3,
    "flash": lambda step: not step.prefill,
}


@every_backend
@every_format
def test_every_option_at_once(fmt, backend):
    rng = np.random.default_rng(8)
    options = {"sliding_window": 21, "soft_cap": 3.0, "softmax_scale": 0.2}
    sinks = rng.standard_normal(GpuEngine.query_heads).astype(np.float32)
    engine = GpuEngine(rng, backend, fmt, "float16", rotated=False, sinks=sinks, **options)
    seen = engine.run(LONGER, masked=MASKED[backend])
    assert seen.changed > 3  # the options matter


@every_backend
@every_format
def test_norm_after_rope_and_no_causality(fmt, backend):
    engine = GpuEngine(
        np.random.default_rng(9), backend, fmt, "bfloat16", norm_after_rope=True, causal=False
    )
    assert engine.run(LONGER[:3]).rows > 0


@every_backend
@every_format
def test_a_batch_of_nothing(fmt, backend):
    engine = GpuEngine(np.random.default_rng(11), backend, fmt, "bfloat16")
    before = [bits(cache) for cache in engine.caches]
    for step in (Step(), Step(prefill=((0, 0),)), Step(decode=((0, 0), (1, 0)), prefill=((2, 0),))):
        out = engine._forward(engine.tokens(step), engine.meta(step))
        assert out.shape == (2, engine.query_heads, engine.dim)
        assert not out.any()
    for cache, want in zip(engine.caches, before, strict=True):
        assert_same_bits(cache, want)


@every_backend
@pytest.mark.parametrize("fmt", ["none", "cache_int8", "block_wise_fp8"])
def test_both_dtypes_of_queries(fmt, backend):
    for dtype in ("float16", "bfloat16"):
        engine = GpuEngine(np.random.default_rng(12), backend, fmt, dtype)
        assert engine.run(LONGER[:3]).rows > 0
