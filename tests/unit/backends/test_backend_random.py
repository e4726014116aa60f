# SPDX-License-Identifier: Apache-2.0
"""`forward_mixed` over random steps of random batches, against plain float64 attention.

The float64 side is `helpers.oracle`, which shares no line with fastkv; the caches are poisoned, and
each step also shows that what is not its own kept its bits.
"""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastkv.backends import BACKEND_NAMES
from fastkv.backends.features import BACKENDS
from helpers.mixed import Engine, Step
from helpers.sentinels import FORMATS

LONGEST = 24  # what the engine's table has room for


@st.composite
def steps(draw):
    """One to four steps: any order of requests, of any kind and size that fits."""
    lengths, found = [0] * 6, []
    for _ in range(draw(st.integers(1, 4))):
        order = draw(st.permutations(range(6)))[: draw(st.integers(1, 6))]
        split = draw(st.integers(0, len(order)))
        entries = []
        for request in order:
            new = draw(st.integers(0, min(7, LONGEST - lengths[request])))
            kept = draw(st.integers(0, new))  # of draft tokens some are rejected
            lengths[request] += kept
            entries.append((request, new, kept))
        found.append(Step(tuple(entries[:split]), tuple(entries[split:])))
    return found


def test_the_strategy_is_about_batches_that_are_mixed():
    seen = set()

    @settings(max_examples=200, database=None, derandomize=True)
    @given(steps())
    def look(found):
        for step in found:
            kinds = (any(e[1] for e in step.decode), any(e[1] for e in step.prefill))
            seen.add((*kinds, any(not e[1] for e in step.entries)))

    look()
    # With decode rows, prefill rows, an empty request: all combinations but none of the three.
    assert len(seen) == 7


@settings(max_examples=60, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    backend=st.sampled_from(BACKEND_NAMES),
    fmt=st.sampled_from(FORMATS),
    steps=steps(),
    rotated=st.booleans(),
    masked=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "causal": st.booleans(),
            "sliding_window": st.sampled_from([None, 1, 5]),
            "soft_cap": st.sampled_from([None, 2.0]),
            "softmax_scale": st.sampled_from([None, 0.4]),
        }
    ),
    with_sinks=st.booleans(),
)
def test_random_steps(seed, backend, fmt, steps, rotated, masked, options, with_sinks):
    rows = sum(entry[1] for step in steps for entry in step.entries)
    assume(rows)  # a batch of nothing has a test of its own
    rng = np.random.default_rng(seed)
    if with_sinks:
        options["sinks"] = rng.standard_normal(6).astype(np.float32)
    masked = masked and "mask_offsets_on_prefill" not in BACKENDS[backend].refuses
    engine = Engine(rng, backend, fmt, rotated=rotated, **options)
    assert engine.run(steps, masked=lambda step: masked).rows == rows
