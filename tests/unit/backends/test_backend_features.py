# SPDX-License-Identifier: Apache-2.0
"""The feature table, walked: each cell runs and matches float64, or refuses with its reason."""

import numpy as np
import pytest

import fastkv.ops
from fastkv.backends import BACKEND_NAMES, FEATURES
from fastkv.backends.features import BACKENDS
from fastkv.errors import UnsupportedError
from helpers.compare import assert_same_bits, bits
from helpers.mixed import DECODE_ONLY, MIXTURE, PREFILL_ONLY, QUERY_HEADS, Engine, Step
from helpers.recording import RecordingOps
from helpers.sentinels import FORMATS


def never(step):
    return False


def sinks():
    return np.random.default_rng(3).uniform(-1, 2, QUERY_HEADS).astype(np.float32)


#: How to ask for each feature: attributes of the layer, steps, which of them carry mask_offsets.
ASK = {
    "window": ({"sliding_window": 3}, MIXTURE, never),
    "soft_cap": ({"soft_cap": 0.7}, MIXTURE, never),
    "sinks": ({"sinks": sinks()}, MIXTURE, never),
    "mask_offsets_on_prefill": ({}, PREFILL_ONLY, lambda step: True),
    "mask_offsets_on_decode": ({}, DECODE_ONLY, lambda step: not step.prefill),
}
CELLS = [(backend, feature) for backend in BACKENDS for feature in FEATURES]
ACCEPTED = [cell for cell in CELLS if cell[1] not in BACKENDS[cell[0]].refuses]
REFUSED = [cell for cell in CELLS if cell[1] in BACKENDS[cell[0]].refuses]


def test_every_cell_is_walked():
    assert set(ASK) == set(FEATURES)
    assert len(ACCEPTED) + len(REFUSED) == len(BACKEND_NAMES) * len(FEATURES) == 15
    assert set(BACKEND_NAMES) == set(BACKENDS)
    for row in BACKENDS.values():
        assert set(row.refuses) <= set(FEATURES)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("backend", "feature"), ACCEPTED)
def test_accepted_cell(backend, feature, fmt):
    attributes, steps, masked = ASK[feature]
    engine = Engine(np.random.default_rng(21), backend, fmt, **attributes)
    # `run` compares with float64 attention that has the feature; without it the rows differ.
    assert engine.run(steps, masked).changed > 10


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("backend", "feature"), REFUSED)
def test_refused_cell(backend, feature, fmt):
    attributes, steps, masked = ASK[feature]
    ops = RecordingOps(through=fastkv.ops)
    engine = Engine(np.random.default_rng(22), backend, fmt, ops=ops, **attributes)
    before = [bits(cache) for cache in engine.caches]
    first = next(step for step in steps if masked(step) or attributes)
    with pytest.raises(UnsupportedError) as caught:
        engine.run([first], masked)
    error = caught.value
    assert isinstance(error, NotImplementedError)
    assert (error.op, error.argument) == (f"{backend}.forward_mixed", feature)
    assert BACKENDS[backend].refuses[feature]
    for part in (backend, feature, BACKENDS[backend].refuses[feature]):
        assert part in str(error)
    assert ops.calls == []
    for cache, want in zip(engine.caches, before, strict=True):
        assert_same_bits(cache, want)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_that_a_backend_serves_at_once(backend, fmt):
    served = [feature for feature in FEATURES if feature not in BACKENDS[backend].refuses]
    attributes = {name: value for feature in served for name, value in ASK[feature][0].items()}
    on_prefill = "mask_offsets_on_prefill" in served
    on_decode = "mask_offsets_on_decode" in served
    engine = Engine(np.random.default_rng(23), backend, fmt, **attributes)

    def masked(step: Step) -> bool:
        return (on_prefill or not step.prefill) and (on_decode or not step.decode)

    assert engine.run(MIXTURE, masked).changed > 10


@pytest.mark.parametrize(("backend", "feature"), REFUSED)
def test_a_mixture_asks_for_both_kinds_of_rows(backend, feature):
    # One refused kind of rows refuses the batch, whatever the other kind is served.
    engine = Engine(np.random.default_rng(24), backend, "none", **ASK[feature][0])
    with pytest.raises(UnsupportedError, match=feature):
        engine.run([Step(decode=((0, 1),), prefill=((1, 3),))], lambda step: True)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_is_served_by_some_backend(feature):
    assert [backend for backend, served in ACCEPTED if served == feature]
