# SPDX-License-Identifier: Apache-2.0
"""What kernels do not serve is refused by the op as by selection, with its reason."""

from types import SimpleNamespace

import numpy as np
import pytest

from fastkv import CacheSpec, LayerCache
from fastkv.backends import select_backend
from fastkv.contracts import calls
from fastkv.errors import SelectionError, UnsupportedError
from fastkv.ops.cuda import jit, serve


@pytest.fixture
def on(monkeypatch):
    """Sets the compute capability of every device."""

    def set_to(sm):
        monkeypatch.setattr(jit, "device_facts", lambda _: SimpleNamespace(sm=sm))

    return set_to


def checked(op="paged_attention", fmt="none", dtype="float16", *, group=2, dim=64, page=16):
    """A call's checker and cache, as a launcher gets them."""
    spec = CacheSpec(2, 2, dim, page, [fmt, "block_wise_fp8"], dtype)
    names = ("k", "v", "k_scale", "v_scale")
    row = spec.layer_quant(0)
    tensors = spec.allocate(3)[: row.tensors_per_layer]
    cache = LayerCache(spec, 0, **dict(zip(names, tensors, strict=False)))
    ids = np.zeros(1, np.int32)
    if op == "copy_pages":
        return calls.copy_pages(cache, ids, ids), cache
    q = np.zeros((1, 2 * group, dim), np.float16)
    cu, table = np.zeros(2, np.int32), np.zeros((1, 1), np.int32)
    options = (None,) * 6
    return calls.paged_attention(q, cache, cu, ids, table, *options), cache


# What is asked for beside the capability -> argument, expected, got, reason.
FP8 = {"fmt": "block_wise_fp8"}
REFUSED = {
    "device": (75, {}, "device", "sm_80 or newer", "cuda (sm_75)", "needs sm_80 or newer"),
    "fp8": (80, FP8, "device", "sm_89 or newer", "cuda (sm_80)", "float8_e4m3fn needs sm_89"),
    "dim": (90, {"dim": 80}, "head_dim", "one of 64, 96, 128, 256", "80", "head dim 80 is none"),
    "page": (90, {"page": 8}, "page_size", "one of 16, 32, 64, 128", "8", "page size 8 is none"),
    "group": (90, {"group": 17}, "query heads a KV head", "1 to 16", "17", "17 query heads a KV"),
    "dtype": (90, {"dtype": "float32"}, "dtype", "one of bfloat16", "float32", "no float32 cache"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_the_op_refuses_with_the_reason_of_selection(on, case):
    sm, asked, argument, expected, got, reason = case
    on(sm)
    checker, cache = checked(**asked)
    with pytest.raises(UnsupportedError) as caught:
        serve.require_served(checker, cache, 0)
    error = caught.value
    assert (error.op, error.argument, error.format) == ("paged_attention", argument, checker.format)
    assert error.expected.startswith(expected)
    assert error.got == got
    assert reason in error.hint
    spec = cache.spec
    alone = CacheSpec(1, 2, spec.head_dim, spec.page_size, checker.format, spec.dtype)
    heads = 2 * asked.get("group", 2)
    with pytest.raises(SelectionError) as refused:
        select_backend("append", alone, f"cuda:{sm}", num_query_heads=heads)
    assert error.hint == f"The CUDA kernels: {refused.value.rejected[0][1]}."


@pytest.mark.parametrize("fmt", ["none", "block_wise_fp8"])
@pytest.mark.parametrize("op", ["paged_attention", "copy_pages"])
def test_what_is_served_passes(on, op, fmt):
    on(89)
    serve.require_served(*checked(op, fmt), 0)


def test_another_layer_s_format_does_not_count(on):
    on(80)  # layer 1 is fp8, and this call is of layer 0
    serve.require_served(*checked(fmt="none"), 0)


def test_an_op_without_a_cache_is_asked_for_device_and_head_dim(on):
    def attends(dim, group=32):
        q, k = np.zeros((3, 2 * group, dim), np.float32), np.zeros((5, 2, dim), np.float32)
        sums = np.zeros(2, np.int32)
        return calls.masked_attention(q, k, k, sums, sums, *(None,) * 6)

    on(80)
    serve.require_served(attends(96), None, 0)
    with pytest.raises(UnsupportedError) as caught:
        serve.require_served(attends(80), None, 0)
    assert (caught.value.argument, caught.value.got) == ("head_dim", "80")
    on(75)
    with pytest.raises(UnsupportedError, match="needs sm_80 or newer"):
        serve.require_served(attends(96), None, 0)


def test_an_op_that_serves_more_shapes_asks_for_the_device_alone(on):
    state = np.zeros((3, 34, 7), np.float32), np.zeros((3, 34), np.float32)
    merge = calls.merge_states(*state, *state)
    on(80)
    serve.require_device(merge, None, 0)
    serve.require_device(*checked(dtype="float32", dim=80, page=8, group=17), 0)
    with pytest.raises(UnsupportedError, match="float8_e4m3fn needs sm_89 or newer"):
        serve.require_device(*checked(fmt="block_wise_fp8"), 0)
    on(75)
    for checker, cache in ((merge, None), checked()):
        with pytest.raises(UnsupportedError, match="needs sm_80 or newer"):
            serve.require_device(checker, cache, 0)


def test_policy_and_refusal_import_no_array_library(run_python):
    code = (
        "import sys, fastkv.ops, fastkv.ops.cuda.serve\n"
        "assert not {'numpy', 'cupy', 'torch', 'paddle'} & set(sys.modules)"
    )
    run_python(code)
