# SPDX-License-Identifier: Apache-2.0
"""The demo's bounds are tight, and every mistake of the class that fastkv ends exceeds them."""

from dataclasses import replace

import numpy as np
import pytest

from fastkv import ops
from fastkv.backends import BACKEND_NAMES
from fastkv.demo.measure import Demo
from fastkv.demo.schedule import requests, steps
from fastkv.demo.serve import demo_layers, demo_spec
from fastkv.quant import QUANT_SPECS

FORMATS = list(QUANT_SPECS.values())
IDS = [quant.name.value for quant in FORMATS]


@pytest.fixture(scope="module")
def demo():
    return Demo()


@pytest.fixture(scope="module")
def good(demo):
    return {(row.backend, row.format): row for row in demo.rows(demo.cells())}


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("quant", FORMATS, ids=IDS)
def test_error_is_within_a_bound_of_at_most_twice_the_error(good, backend, quant):
    row = good[backend, quant.name.value]
    assert row.ok
    assert row.error <= row.bound <= 2 * row.error
    assert row.error < row.worst_row


def test_every_backend_and_format_is_measured(good):
    assert set(good) == {(name, quant) for name in BACKEND_NAMES for quant in QUANT_SPECS}


class MisreadingOps:
    """The real ops, except that whatever reads the cache is handed another one."""

    def __init__(self, misread):
        self.misread = misread
        self.written = {}

    def rope_write_kv(self, qkv, cache, **kwargs):
        self.written[cache.layer_id] = cache
        return ops.rope_write_kv(qkv, cache, **kwargs)

    def gather_kv(self, cache, **kwargs):
        return ops.gather_kv(self.misread(cache, self.written), **kwargs)

    def paged_attention(self, q, cache, **kwargs):
        return ops.paged_attention(q, self.misread(cache, self.written), **kwargs)

    masked_attention = staticmethod(ops.masked_attention)
    zeros_beside = staticmethod(ops.zeros_beside)


def of_another_layer(cache, written):
    other = written.get((cache.layer_id - 1) % cache.spec.num_layers, cache)
    return replace(cache, k=other.k, v=other.v, k_scale=other.k_scale, v_scale=other.v_scale)


def without_scales(cache, _):
    if cache.static is not None:
        ones = {n: np.ones_like(getattr(cache.static, n)) for n in ("k_dequant", "v_dequant")}
        return replace(cache, static=replace(cache.static, **ones))
    return replace(cache, k_scale=np.ones_like(cache.k_scale), v_scale=np.ones_like(cache.v_scale))


def quant_for_dequant(cache, _):
    static = cache.static
    if static is not None:
        swapped = replace(static, k_dequant=static.k_quant, v_dequant=static.v_quant)
        return replace(cache, static=swapped)
    with np.errstate(divide="ignore"):  # pages that were never written have scale 0
        scales = {n: 1 / getattr(cache, n) for n in ("k_scale", "v_scale")}
    return replace(cache, **{n: np.where(np.isinf(s), 0, s) for n, s in scales.items()})


def k_and_v_scales_swapped(cache, _):
    static = cache.static
    if static is not None:
        swapped = replace(static, k_dequant=static.v_dequant, v_dequant=static.k_dequant)
        return replace(cache, static=swapped)
    return replace(cache, k_scale=cache.v_scale, v_scale=cache.k_scale)


def zero_points_swapped(cache, _):
    static = cache.static
    return replace(cache, static=replace(static, k_zp=static.v_zp, v_zp=static.k_zp))


def mistakes():
    for quant in FORMATS:
        yield quant, of_another_layer
        if quant.needs_static or quant.needs_paged_scales:
            yield quant, without_scales
            yield quant, quant_for_dequant
            yield quant, k_and_v_scales_swapped
        if quant.needs_zp:
            yield quant, zero_points_swapped


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(
    ("quant", "mistake"),
    list(mistakes()),
    ids=lambda x: getattr(x, "__name__", None) or x.name.value,
)
def test_every_mistake_exceeds_the_bound(demo, good, backend, quant, mistake):
    row = demo.row(backend, quant, MisreadingOps(mistake))
    assert not row.ok
    assert row.error > row.bound
    assert row.bound == good[backend, quant.name.value].bound


def test_misreading_ops_change_nothing_by_themselves(demo, good):
    quant = QUANT_SPECS["block_wise_fp8"]
    row = demo.row("flash_mask", quant, MisreadingOps(lambda cache, _: cache))
    assert row.error == good["flash_mask", "block_wise_fp8"].error


def test_steps_mix_everything_an_engine_does(demo):
    batch = requests(demo.sample)
    served = [0] * len(batch)
    kinds = set()
    for step in steps(batch):
        for place, (i, cached, new) in enumerate(
            zip(step.order, step.cached, step.new, strict=True)
        ):
            assert cached == served[i]
            served[i] += new
            decodes = place < step.num_decode
            kinds.add((decodes, "none" if new == 0 else "one" if new == 1 else "many", cached > 0))
        if 0 < step.num_decode < len(batch) and all(step.new):
            kinds.add("mixed")
    assert served == [len(request.tokens) for request in batch]
    assert {
        "mixed",
        (False, "many", False),  # prefill
        (False, "many", True),  # a chunk over a cached prefix
        (True, "one", True),  # decode
        (True, "many", True),  # draft tokens
        (False, "none", False),  # a request that has not come yet
    } <= kinds
    tokens = np.concatenate([request.tokens[1:] for request in batch])
    assert len(set(tokens)) == len(tokens) == demo.sample.num_tokens - 1


def test_no_format_but_none_stores_the_samples_values_exactly(demo):
    for quant in FORMATS:
        spec = demo_spec(demo.sample, quant)
        statics = [layer.static_scales for layer in demo_layers(demo.sample, spec)]
        assert all((static is not None) == quant.needs_static for static in statics)
