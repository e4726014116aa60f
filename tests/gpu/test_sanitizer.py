# SPDX-License-Identifier: Apache-2.0
"""Small calls of every op and format: what scripts/sanitize.py runs, beside the value faults."""

import numpy as np
import pytest

from helpers.batches import FORMATS, make_batch
from helpers.calls import OPS
from helpers.on_gpu import gpu_call, host_call, synchronize, tensors_in, to_cpu

pytestmark = pytest.mark.sanitizer


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("op", OPS)
def test_an_op_with_everything_given(op, fmt):
    call = gpu_call(op, fmt)
    result = call.run()
    synchronize()
    want = host_call(op, fmt).run()
    assert [tuple(t.shape) for t in tensors_in(result)] == [
        x.shape for x in (want if isinstance(want, tuple) else () if want is None else (want,))
    ]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(
    "op", ["rope_write_kv", "gather_kv", "paged_attention", "masked_attention"]
)
def test_head_dims(op, head_dim):
    gpu_call(op, "cache_int8", head_dim=head_dim, group=2).run()
    synchronize()


@pytest.mark.parametrize("fmt", ["none", "cache_int4_zp"])
def test_a_context_that_is_split_between_blocks(fmt):
    # Long for one request: its chunks are merged by the last block that arrives.
    call = gpu_call("paged_attention", fmt, cached=(1500, 3), new=(1, 4))
    call["window"] = None
    out, _ = call.run()
    synchronize()
    assert to_cpu(out).shape[0] == 6


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, "float16"), (128, "bfloat16"), (256, "float16")]
)
@pytest.mark.parametrize("window", [None, 40])
def test_tiles_of_rows_and_keys_that_are_full_and_in_part(head_dim, dtype, window):
    shape = {"cached": (300, 3, 70), "new": (140, 1, 128), "kv_heads": 1, "group": 2}
    call = gpu_call("masked_attention", "none", head_dim=head_dim, dtype=dtype, **shape)
    call["window"] = window
    out, _ = call.run()
    synchronize()
    assert to_cpu(out).shape[0] == 270


def test_the_batch_is_poisoned():
    # initcheck would not see an op that reads bytes of nobody: poison is written memory.
    batch = make_batch(np.random.default_rng(0), "none", dtype="float16")
    assert np.isnan(batch.cache.k.astype(np.float32)).any()
