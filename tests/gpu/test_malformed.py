# SPDX-License-Identifier: Apache-2.0
"""Malformed calls on a GPU: what metadata shows raises as on the CPU; values cannot do harm."""

import json
import time

import numpy as np
import pytest

from fastkv.errors import ContractError
from fastkv.ops.cuda import launch
from helpers.calls import OPS, Call
from helpers.malformed import FAULTY, NEW, VALUE_FAULTS, metadata_faults, value_call
from helpers.on_gpu import (
    DEVICE,
    bytes_of,
    host_call,
    snapshot,
    tensors_in,
    to_cpu,
    to_gpu,
    with_helpers,
)

GUARD = 2  # entries of the first axis before and after what an op may write
GUARD_BYTE = 0x5A


# --- metadata ---------------------------------------------------------------------------------


def outcome(call):
    """Class and text of what a call raises."""
    with pytest.raises(ContractError) as caught:
        call.run()
    return type(caught.value), str(caught.value), caught.value.argument


@pytest.mark.parametrize("library", ["torch", "cupy"])
@pytest.mark.parametrize("fmt", ["cache_int4_zp", "block_wise_fp8"])
@pytest.mark.parametrize("op", OPS)
def test_metadata_faults_raise_the_same_text_as_on_the_cpu(op, fmt, library, mocker):
    launched = mocker.spy(launch.Kernel, "launch")
    count = 0
    for name, call in metadata_faults(op, fmt, lambda: host_call(op, fmt)):
        try:
            want = outcome(call)
        except pytest.fail.Exception:
            continue  # one more row of nobody, or one more page: legal
        moved = Call(op, {key: to_gpu(a, library) for key, a in call.arguments.items()})
        before = snapshot(moved.arguments)
        assert outcome(moved) == spelled_for(library, want), name
        assert snapshot(moved.arguments) == before, name
        count += 1
    assert count >= 15
    assert launched.call_count == 0


def spelled_for(library, want):
    """Tensors are named as their library does, and CuPy holds float8 as uint8: no more differs."""
    kind, text, argument = want
    if library == "torch":
        text = text.replace("got ndarray", "got Tensor")
    if library == "cupy":
        text = text.replace("got float8_e4m3fn", "got uint8")
    return kind, text, argument


# --- values -----------------------------------------------------------------------------------


class Guarded:
    """A call on a GPU whose written tensors lie between guards, and what it may change."""

    def __init__(self, host, library):
        self.call = Call(host.op, {n: to_gpu(a, library) for n, a in host.arguments.items()})
        self.buffers = []
        cache = ["cache.k", "cache.v", "cache.k_scale", "cache.v_scale"]
        for name in (*cache, "out", "out_k", "out_v"):
            if name.partition(".")[0] in host.arguments and host[name] is not None:
                self.call[name] = self._between_guards(host[name], library)
        self.before = self.pages()

    def _between_guards(self, array, library):
        whole = np.full((len(array) + 2 * GUARD, *array.shape[1:]), 0, array.dtype)
        whole.view(np.uint8)[...] = GUARD_BYTE
        whole[GUARD:-GUARD] = array
        buffer = to_gpu(whole, library)
        self.buffers.append(buffer)
        return buffer[GUARD:-GUARD]

    def run(self):
        result = self.call.run()
        finish()
        for buffer in self.buffers:
            raw = to_cpu(buffer).view(np.uint8)
            assert (raw[:GUARD] == GUARD_BYTE).all(), "something was written before a tensor"
            assert (raw[-GUARD:] == GUARD_BYTE).all(), "something was written behind a tensor"
        return result

    def pages(self):
        """The bytes of each page, of all cache tensors together."""
        if "cache" not in self.call.arguments:
            return []
        tensors = [to_cpu(t) for n, t in self.cache_tensors()]
        return [b"".join(t[page].tobytes() for t in tensors) for page in range(len(tensors[0]))]

    def cache_tensors(self):
        cache = self.call["cache"]
        every = {name: getattr(cache, name) for name in ("k", "v", "k_scale", "v_scale")}
        return [(name, tensor) for name, tensor in every.items() if tensor is not None]

    def rows(self, result, host, spared):
        """The bytes of every written row that belongs to the spared requests."""
        found = []
        by_query = [t for t in tensors_in(result) if t.shape[0] == rows_of(host)]
        by_key = [self.call[n] for n in ("out_k", "out_v") if n in self.call.arguments]
        for tensors, sums in ((by_query, "cu_seqlens_q"), (by_key, "cu_seqlens_k")):
            for tensor in tensors:
                array, at = to_cpu(tensor), host[sums]
                found += [array[at[b] : at[b + 1]].tobytes() for b in spared]
        return found


def rows_of(host):
    given = host.arguments
    return len(given["qkv"] if "qkv" in given else given["q"]) if host.op != "gather_kv" else -1


def finish(seconds=30):
    """Wait for the device; a kernel that hangs ends the run instead of stopping it for ever."""
    import cupy

    with cupy.cuda.Device(int(DEVICE[5:])):
        event = cupy.cuda.Event()
        event.record(cupy.cuda.Stream(null=True))
        deadline = time.monotonic() + seconds
        while not event.done:
            if time.monotonic() > deadline:
                pytest.exit(f"a kernel still runs after {seconds} s", returncode=1)
            time.sleep(0.001)
        cupy.cuda.runtime.deviceSynchronize()


CASES = [(fault, op) for fault in VALUE_FAULTS for op in fault.ops]


@pytest.mark.sanitizer
@pytest.mark.parametrize("fmt", ["cache_int8", "cache_int4_zp", "block_wise_fp8"])
@pytest.mark.parametrize(("fault", "op"), CASES, ids=[f"{op}-{f.name}" for f, op in CASES])
def test_value_faults_do_no_harm(fault, op, fmt):
    host = value_call(op, fmt)
    clean = Guarded(host, "torch")
    clean_result = clean.run()
    faulty = Guarded(fault.put_in(value_call(op, fmt)), "torch")
    result = faulty.run()
    if op == "copy_pages":
        skipped = value_call(op, fmt)
        skipped["src"][FAULTY] = -1
        expected = Guarded(skipped, "torch")
        expected.run()
        assert faulty.pages() == expected.pages()
        return
    if "cache" in host.arguments:
        check_pages(fault, host, faulty, clean)
    if fault.one:
        spared = [b for b in range(len(NEW)) if b != FAULTY]
        rows = faulty.rows(result, host, spared)
        assert rows == clean.rows(clean_result, host, spared)
        assert rows, "rows of the other requests were compared"


def check_pages(fault, host, faulty, clean):
    """The pages of all but the request at fault are what they would be without it."""
    table = host["block_table"]
    own = {int(page) for page in table[FAULTY if fault.one else slice(None)].reshape(-1)}
    pages = zip(faulty.pages(), clean.pages(), faulty.before, strict=True)
    for page, (got, want, before) in enumerate(pages):
        if page not in own:
            assert got == (want if fault.one else before), f"page {page} of somebody else"
    if host.op in ("gather_kv", "paged_attention"):
        assert faulty.pages() == faulty.before, "the op only reads"


REPORT = """
import json
from fastkv.errors import BatchValueError
from helpers.calls import Call
from helpers.on_gpu import synchronize, to_gpu
from helpers.malformed import VALUE_FAULTS, value_call

def outcome(call):
    moved = Call(call.op, {n: to_gpu(a, "torch") for n, a in call.arguments.items()})
    try:
        moved.run()
        synchronize()
    except BatchValueError as error:
        return [type(error).__name__, error.op, error.argument]
    return None

found = {"clean": {}, "faulty": []}
for fault in VALUE_FAULTS:
    for op in fault.ops:
        found["clean"][op] = outcome(value_call(op, "cache_int8"))
        call = fault.put_in(value_call(op, "cache_int8"))
        found["faulty"].append([fault.name, op, fault.argument, outcome(call)])
print(json.dumps(found))
"""


def test_value_faults_are_reported_when_asked_for(run_python):
    found = json.loads(run_python(REPORT, FASTKV_CHECK="1", **with_helpers()).stdout)
    assert set(found["clean"].values()) == {None}, "a legal call is not reported"
    wrong = []
    for name, op, argument, reported in found["faulty"]:
        if reported is None or reported[:2] != ["BatchValueError", op]:
            wrong.append((name, op, reported))
        elif not reported[2].startswith(also_true(op, argument)):
            wrong.append((name, op, f"{reported[2]} instead of {argument}"))
    assert wrong == []
    assert len(found["faulty"]) == len(CASES)


def also_true(op, argument):
    """What may be reported: other lengths than the segments hold are a fault of these too."""
    counts = op == "rope_write_kv" and argument in ("cache_seqlens", "cu_seqlens_q")
    # Other rows or keys than the intervals were made for.
    moved = op == "masked_attention" and argument in ("cu_seqlens_q", "cu_seqlens_k")
    also = ("cu_seqlens_k",) if counts else ("mask_offsets",) if moved else ()
    return (argument, *also)


def test_bytes_of_a_guard_are_compared():
    guarded = Guarded(value_call("copy_pages", "cache_int8"), "torch")
    guarded.buffers[0][0] = 1
    with pytest.raises(AssertionError, match="before a tensor"):
        guarded.run()
    assert bytes_of(guarded.buffers[0])[:1] == b"\x01"
