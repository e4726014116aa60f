# SPDX-License-Identifier: Apache-2.0
"""Paddle's GPU tensors, by a stand-in that speaks their protocol; Paddle itself was never run."""

import json

import pytest

from helpers.calls import OPS
from helpers.on_gpu import with_helpers

SCRIPT = """
import json, os
from helpers import paddle_stand_in
made = paddle_stand_in.install()

import torch
from fastkv import arrays
from helpers.calls import Call
from helpers.on_gpu import map_tensors, snapshot, tensors_in, to_gpu
from helpers.growing import growing_call

stream = torch.cuda.Stream()

def run(op, fmt, wrap, unwrap):
    host, steps = growing_call(op, fmt, "bfloat16")
    given = map_tensors(to_gpu(host.arguments | steps[-1], "torch"), wrap)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        result = Call(op, given).run()
    torch.cuda.synchronize()
    dtypes = [arrays.describe(tensor)[:3] for tensor in tensors_in(result)]
    return dtypes, snapshot(map_tensors([given, result], unwrap))

def same(tensor):
    return tensor

found = {}
for op in os.environ["OPS"].split():
    for fmt in ("none", "block_wise_fp8"):
        dtypes, want = run(op, fmt, same, same)
        with_paddle, got = run(op, fmt, paddle_stand_in.Tensor, lambda tensor: tensor.inner)
        found[f"{op} {fmt}"] = {"torch": dtypes, "paddle": with_paddle, "same": got == want}
bf16 = paddle_stand_in.Tensor(torch.zeros(2, 3, dtype=torch.bfloat16, device="cuda:0"))
assert bf16.__cuda_array_interface__["typestr"] == "<f2", "the trap is set"
print(json.dumps({"found": found, "bf16": arrays.describe(bf16), "made": made}))
"""


def test_ops_take_paddle_tensors_by_pointer_and_true_dtype(run_python):
    done = run_python(SCRIPT, OPS=" ".join(OPS), **with_helpers())
    said = json.loads(done.stdout)
    assert said["bf16"] == ["paddle", "cuda:0", "bfloat16", [2, 3], True]
    assert set(said["found"]) == {f"{op} {fmt}" for op in OPS for fmt in ("none", "block_wise_fp8")}
    for name, ran in said["found"].items():
        assert ran["same"], f"{name}: other bytes than with torch"
        assert [kind[1:] for kind in ran["paddle"]] == [kind[1:] for kind in ran["torch"]], name
        assert {kind[0] for kind in ran["paddle"]} <= {"paddle"}, name
    # Results are made by Paddle, as bits of their size, and then given their dtype.
    assert {dtype for _, dtype in said["made"]} <= {"int16", "float32"}
    assert said["made"]


@pytest.mark.parametrize("attribute", ["data_ptr", "place", "strides"])
def test_the_stand_in_is_asked_for_its_protocol(run_python, attribute):
    # Without one of its parts nothing works: the bytes above came by no other way.
    broken = SCRIPT.replace(
        "made = paddle_stand_in.install()",
        f"made = paddle_stand_in.install()\ndel paddle_stand_in.Tensor.{attribute}",
    )
    with pytest.raises(AssertionError, match=f"no attribute '{attribute}'"):
        run_python(broken, OPS="merge_states", **with_helpers())
