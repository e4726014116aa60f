# SPDX-License-Identifier: Apache-2.0
"""Calls that are missing, late, or cut at the wrong requests; kernels of one's own."""

import pickle
from types import SimpleNamespace
from typing import ClassVar

import pytest

from fastkv import QuantType
from fastkv.backends import AppendBackend, FlashBackend, resolve
from fastkv.backends.base import batch_arguments
from fastkv.errors import UnknownNameError
from fastkv.testing import SCENARIOS, Scenario, SentinelTensor, conformance
from fastkv.testing.conformance import ConformanceError, Observation

BY_STEP = {
    step: conformance.cases(formats=["cache_int4_zp"], scenarios=[step]) for step in SCENARIOS
}
MIXED = BY_STEP["mixed"][0]
PREFIX = BY_STEP["prefill over a prefix"][0]


def faults(make_backend, case=MIXED):
    """(op, argument) -> what was expected and what came."""
    found = conformance.faults(case, make_backend)
    return {(fault.op, fault.argument): (fault.expected, fault.got) for fault in found}


class Changed:
    """Ops through which a backend calls the recording ones: some calls are changed on the way."""

    def __init__(self, ops, **changes):
        self._ops, self._changes = ops, changes

    def __getattr__(self, name):
        real = getattr(self._ops, name)
        if name not in self._changes:
            return real
        return lambda *args, **kwargs: self._changes[name](real, *args, **kwargs)


def changed(backend, **changes):
    return lambda ops: backend(Changed(ops, **changes))


def never(real, *args, **kwargs):
    out = kwargs.get("out")
    return SentinelTensor("nothing was called") if out is None else out


def with_keyword(**values):
    return lambda real, *args, **kwargs: real(*args, **(kwargs | values))


# --- a call that is missing -----------------------------------------------------------------------


@pytest.mark.parametrize("step", SCENARIOS)
def test_no_op_at_all(step):
    idle = SimpleNamespace(forward_mixed=lambda qkv, layer, meta: qkv)
    for case in BY_STEP[step]:
        found = faults(lambda ops: idle, case)
        requests = ", ".join(str(i) for i in range(case.scenario.num_requests))
        assert found == {
            ("write", "requests"): ("every request written", f"requests {requests} never written"),
            ("attend", "requests"): (
                "every request attended",
                f"requests {requests} never attended",
            ),
        }


@pytest.mark.parametrize(
    ("step", "missing"),
    [
        ("decode only", None),
        ("prefill", None),  # a gather of nothing
        ("prefill over a prefix", "none for requests 0, 1, whose keys are cached"),
        ("mixed", "none for request 3, whose keys are cached"),
    ],
)
def test_no_gather_where_keys_are_cached(step, missing):
    for case in BY_STEP[step]:
        found = faults(changed(FlashBackend, gather_kv=never), case)
        want = ("a gather of the prefix before masked_attention", missing)
        assert found == ({("gather", "requests"): want} if missing else {})


@pytest.mark.parametrize("backend", [AppendBackend, FlashBackend])
@pytest.mark.parametrize("step", SCENARIOS)
def test_no_write(backend, step):
    for case in BY_STEP[step]:
        found = faults(changed(backend, rope_write_kv=never), case)
        assert ("write", "requests") in found
        attending = {op for op, _ in found} - {"write"}
        assert attending <= {"paged_attention", "masked_attention"}
        assert attending


@pytest.mark.parametrize(
    ("step", "op", "missing"),
    [
        ("decode only", "paged_attention", "requests 0, 1, 2 never attended"),
        ("prefill", "masked_attention", "requests 0, 1 never attended"),
        ("prefill over a prefix", "masked_attention", "requests 0, 1 never attended"),
        ("mixed", "paged_attention", "requests 0, 1 never attended"),
        ("mixed", "masked_attention", "requests 2, 3 never attended"),
    ],
)
def test_no_attention(step, op, missing):
    for case in BY_STEP[step]:
        found = faults(changed(FlashBackend, **{op: never}), case)
        assert found[("attend", "requests")] == ("every request attended", missing)


def test_attention_before_the_write():
    class Hasty(AppendBackend):
        def _forward(self, qkv, cache, options, meta):
            out = self.ops.paged_attention(qkv, cache, **batch_arguments(meta))
            self.ops.rope_write_kv(qkv, cache, **batch_arguments(meta), rope=meta.rope)
            return out

    text = "K and V of requests 0, 1, 2, 3 are not written yet"
    assert faults(Hasty) == {("paged_attention", "requests"): ("a write before it", text)}


def test_requests_attended_twice():
    def twice(real, *args, **kwargs):
        return real(*args, **kwargs, out=real(*args, **kwargs))

    found = faults(changed(FlashBackend, paged_attention=twice))
    assert found == {("attend", "requests"): ("each attended once", "requests 0, 1 attended twice")}


# --- tensors of the batch -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cache_seqlens", "block_table"])
def test_a_whole_tensor_where_a_part_belongs(name):
    whole = getattr(MIXED.meta, name)
    found = faults(changed(FlashBackend, paged_attention=with_keyword(**{name: whole})))
    # Which of the three counts is open: at least one disagrees with the others.
    wrong = {argument for op, argument in found if op == "paged_attention"}
    assert wrong
    assert wrong <= {"cu_seqlens_q", "cache_seqlens", "block_table"}


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cache_seqlens", "block_table"])
@pytest.mark.parametrize("op", ["rope_write_kv", "paged_attention"])
@pytest.mark.parametrize("got", [None, SentinelTensor("somebody's", (5,)), object()])
def test_another_tensor_or_none(name, op, got):
    found = faults(changed(AppendBackend, **{op: with_keyword(**{name: got})}))
    want, came = found.pop((op, name))
    assert want == f"<{name}>"
    assert came in ("None", "<somebody's>", "object")
    assert not {argument for _, argument in found} - {
        "cu_seqlens_q",
        "cache_seqlens",
        "block_table",
    }


def test_lengths_of_queries_for_lengths_of_keys():
    def mistaken(real, *args, **kwargs):
        return real(*args, **(kwargs | {"cu_seqlens_k": kwargs["cu_seqlens_q"]}))

    assert faults(changed(FlashBackend, masked_attention=mistaken)) == {
        ("masked_attention", "cu_seqlens_k"): ("<cu_seqlens_k[2:5]>", "<cu_seqlens_q[2:5]>")
    }


def test_prefill_cut_one_request_late():
    def late(real, *args, **kwargs):
        cut = {name: kwargs[name][1:] for name in ("cu_seqlens_q", "cu_seqlens_k")}
        return real(*args, **(kwargs | cut))

    assert faults(changed(FlashBackend, masked_attention=late)) == {
        ("attend", "requests"): ("every request attended", "request 2 never attended")
    }


@pytest.mark.parametrize("table", ["cos", "sin"])
def test_a_rotary_table(table):
    from fastkv import Rope

    rope = MIXED.meta.rope
    swapped = Rope(rope.sin, rope.cos)
    found = faults(changed(AppendBackend, rope_write_kv=with_keyword(rope=swapped)))
    other = {"cos": "sin", "sin": "cos"}[table]
    assert found[("rope_write_kv", f"rope.{table}")] == (f"<rope.{table}>", f"<rope.{other}>")
    dropped = faults(changed(AppendBackend, rope_write_kv=with_keyword(rope=None)))
    assert dropped[("rope_write_kv", f"rope.{table}")] == (f"<rope.{table}>", "None")


# --- q, contiguous K and V, out -------------------------------------------------------------------


def test_queries_that_were_not_rotated():
    def unrotated(real, q, *args, **kwargs):
        return real(MIXED.qkv, *args, **kwargs)

    for op in ("paged_attention", "masked_attention"):
        found = faults(changed(FlashBackend, **{op: unrotated}))
        assert {where: got for where, (_, got) in found.items()} == {(op, "q"): "<qkv>"}
        assert found[(op, "q")][0] == "<call 2, rope_write_kv: q>"


def test_contiguous_k_and_v_swapped():
    def swapped(real, q, k, v, **kwargs):
        return real(q, v, k, **kwargs)

    assert faults(changed(FlashBackend, masked_attention=swapped)) == {
        ("masked_attention", "k"): (
            "<call 0, zeros_beside: zeros>",
            "<call 1, zeros_beside: zeros>",
        ),
        ("masked_attention", "v"): (
            "<call 1, zeros_beside: zeros>",
            "<call 0, zeros_beside: zeros>",
        ),
    }


@pytest.mark.parametrize("op", ["rope_write_kv", "gather_kv"])
def test_buffers_swapped(op):
    def swapped(real, *args, out_k, out_v, **kwargs):
        return real(*args, **kwargs, out_k=out_v, out_v=out_k)

    found = faults(changed(FlashBackend, **{op: swapped}), PREFIX)
    # Who comes second is blamed.
    blamed = "gather_kv"
    assert found[(blamed, "out_k")][0] != found[(blamed, "out_k")][1]
    assert (blamed, "out_v") in found


def test_one_buffer_for_both():
    def same(real, *args, out_k, out_v, **kwargs):
        return real(*args, **kwargs, out_k=out_k, out_v=out_k)

    found = faults(changed(FlashBackend, rope_write_kv=same), PREFIX)
    assert found[("rope_write_kv", "out_v")] == (
        "a contiguous V of its own",
        "<call 0, zeros_beside: zeros>",
    )


@pytest.mark.parametrize("kind", ["k", "v"])
@pytest.mark.parametrize("op", ["rope_write_kv", "gather_kv"])
def test_a_buffer_that_nobody_reads(op, kind):
    elsewhere = SentinelTensor("elsewhere")
    found = faults(
        changed(FlashBackend, **{op: with_keyword(**{f"out_{kind}": elsewhere})}), PREFIX
    )
    want, got = found[("masked_attention", kind)]
    assert want == "<elsewhere>"
    assert "zeros_beside" in got


@pytest.mark.parametrize("step", ["prefill", "prefill over a prefix", "mixed"])
def test_new_tokens_that_are_not_left_in_the_buffers(step):
    def forgetful(real, *args, out_k, out_v, cu_seqlens_k, **kwargs):
        return real(*args, **kwargs)

    for case in BY_STEP[step]:
        assert faults(changed(FlashBackend, rope_write_kv=forgetful), case) == {
            ("masked_attention", kind): (
                "what a write filled",
                f"<call {i}, zeros_beside: zeros>",
            )
            for i, kind in enumerate("kv")
        }


@pytest.mark.parametrize(("kind", "place"), [("k", 1), ("v", 2)])
def test_contiguous_k_or_v_that_is_none(kind, place):
    def without(real, *args, **kwargs):
        return real(*(None if i == place else one for i, one in enumerate(args)), **kwargs)

    ((where, (_, got)),) = faults(changed(FlashBackend, masked_attention=without)).items()
    assert (where, got) == (("masked_attention", kind), "None")


class Allocating(FlashBackend):
    """Makes its buffers and its output itself: tensors that are no sentinels."""

    def _forward(self, qkv, cache, options, meta):
        self.made = []
        ops, out = self._ops, object()

        def make(real, like, shape):
            self.made.append(SimpleNamespace(shape=shape))
            return self.made[-1]

        attend = with_keyword(out=out)
        self._ops = Changed(ops, zeros_beside=make, paged_attention=attend, **self.changes)
        super()._forward(qkv, cache, options, meta)
        return out

    changes: ClassVar = {"masked_attention": with_keyword(out=None)}


def test_buffers_and_output_of_another_library():
    class Right(Allocating):
        changes: ClassVar = {}

    for case in (MIXED, BY_STEP["decode only"][0]):
        assert faults(Right, case) == {}
    found = faults(Allocating)
    assert found == {
        ("masked_attention", "out"): (
            "<call 3, masked_attention: out>",
            "object as the backend's result",
        )
    }


def test_buffers_of_another_library_swapped():
    class Swapped(Allocating):
        changes: ClassVar = {
            "masked_attention": lambda real, q, k, v, **kwargs: real(q, v, k, **kwargs)
        }

    assert {where for where, _ in faults(Swapped).items()} == {
        ("masked_attention", "k"),
        ("masked_attention", "v"),
    }


def test_a_gather_after_the_attention():
    class Late(FlashBackend):
        def _forward(self, qkv, cache, options, meta):
            waiting = []
            ops = self._ops
            self._ops = Changed(ops, gather_kv=lambda real, *a, **k: waiting.append((real, a, k)))
            out = super()._forward(qkv, cache, options, meta)
            for real, args, kwargs in waiting:
                real(*args, **kwargs)
            return out

    assert set(faults(Late)) == {("gather", "requests")}
    assert faults(Late, BY_STEP["prefill"][0]) == {}


def test_two_outputs():
    found = faults(changed(FlashBackend, masked_attention=with_keyword(out=None)))
    assert found == {
        ("paged_attention", "out"): (
            "<call 3, paged_attention: out>",
            "<call 5, masked_attention: out> as the backend's result",
        )
    }


@pytest.mark.parametrize(("result", "shown"), [(None, "None"), (7, "7"), (object(), "object")])
def test_another_result(result, shown):
    class Forgetful(AppendBackend):
        def _forward(self, *args):
            super()._forward(*args)
            return result

    (found,) = faults(Forgetful).values()
    assert found[1] == f"{shown} as the backend's result"


class Cascade:
    """New tokens and prefix in buffers of their own, their states merged."""

    def __init__(self, ops, swap=False, result=0):
        self.ops, self.swap, self.result = ops, swap, result

    def forward_mixed(self, qkv, layer, meta):
        ops = self.ops
        cache = resolve(meta.caches, layer, meta.spec)
        batch = batch_arguments(meta)
        q, new_k, new_v = ops.rope_write_kv(qkv, cache, **batch, rope=meta.rope, return_kv=True)
        sums = {"cu_seqlens_q": meta.cu_seqlens_q, "cu_seqlens_k": meta.cu_seqlens_k}
        old_k, old_v = (ops.zeros_beside(qkv, (99, 2, 64)) for _ in range(2))
        part = {name: batch[name] for name in ("cache_seqlens", "block_table")}
        ops.gather_kv(cache, **part, cu_seqlens_k=sums["cu_seqlens_k"], out_k=old_k, out_v=old_v)
        new = (new_v, new_k) if self.swap else (new_k, new_v)
        one = ops.masked_attention(q, *new, **sums, return_lse=True)
        other = ops.masked_attention(q, old_k, old_v, **sums, causal=False, return_lse=True)
        return (ops.merge_states(*one, *other)[0], one[0])[self.result]


@pytest.mark.parametrize("step", SCENARIOS)
def test_merged_states_may_attend_twice(step):
    for case in BY_STEP[step]:
        assert faults(Cascade, case) == {}
        swapped = faults(lambda ops: Cascade(ops, swap=True), case)
        assert set(swapped) == {("masked_attention", "k"), ("masked_attention", "v")}
        unmerged = faults(lambda ops: Cascade(ops, result=1), case)
        assert set(unmerged) == {("merge_states", "out")}


class NewTokensApart:
    """The pages serve the prefix, contiguous K and V the new tokens; nothing is gathered."""

    def __init__(self, ops):
        self.ops = ops

    def forward_mixed(self, qkv, layer, meta):
        cache = resolve(meta.caches, layer, meta.spec)
        batch = batch_arguments(meta)
        q, k, v = self.ops.rope_write_kv(qkv, cache, **batch, rope=meta.rope, return_kv=True)
        sums = {"cu_seqlens_q": meta.cu_seqlens_q, "cu_seqlens_k": meta.cu_seqlens_k}
        one = self.ops.masked_attention(q, k, v, **sums, return_lse=True)
        other = self.ops.paged_attention(q, cache, **batch, causal=False, return_lse=True)
        return self.ops.merge_states(*one, *other)[0]


@pytest.mark.parametrize("step", SCENARIOS)
def test_a_prefix_on_pages_needs_no_gather(step):
    for case in BY_STEP[step]:
        assert faults(NewTokensApart, case) == {}


def test_an_optional_argument_may_be_none():
    absent = with_keyword(out_k=None, out_v=None, cu_seqlens_k=None)
    assert faults(changed(AppendBackend, rope_write_kv=absent)) == {}


# --- kernels of one's own -------------------------------------------------------------------------


def by_attributes(case):
    """What an engine's backend with kernels of its own hands to them, found without `resolve`."""
    layer, i = case.layer, case.layer_id
    sizes = [len(case.spec.layer_tensors(j, 1)) for j in range(case.spec.num_layers)]
    first = sum(sizes[:i])
    names = ("k", "v", "k_scale", "v_scale")[: sizes[i]]
    given = dict(zip(names, case.caches[first : first + sizes[i]], strict=True))
    if case.quant.needs_static:
        given |= {
            "k_quant": layer.cache_k_scale,
            "k_dequant": layer.cache_k_out_scale,
            "v_quant": layer.cache_v_scale,
            "v_dequant": layer.cache_v_out_scale,
            "k_zp": getattr(layer, "cache_k_zp", None),
            "v_zp": getattr(layer, "cache_v_zp", None),
        }
    return given


TENSORS = (
    *("k", "v", "k_scale", "v_scale"),
    *("k_quant", "k_dequant", "v_quant", "v_dequant", "k_zp", "v_zp"),
)


def fused(case, **changes):
    """One kernel that does everything; it says nothing of requests."""
    return [Observation("fused_kernel", ("write", "attend_pages"), by_attributes(case) | changes)]


def split(case, without=(), **requests):
    """A kernel for each role; a write takes no dequant multipliers, a read no others."""
    given, decode = by_attributes(case), case.scenario.num_decode
    written = {n: t for n, t in given.items() if not n.endswith("dequant")}
    read = {n: t for n, t in given.items() if not n.endswith("quant") or n.endswith("dequant")}
    calls = [Observation("store", ("write",), written)]
    if decode:
        calls.append(Observation("decode", ("attend_pages",), read, requests.get("decode")))
    if decode < case.scenario.num_requests:
        calls.append(Observation("load", ("gather",), read, requests.get("gather")))
        calls.append(Observation("prefill", ("attend_contiguous",), {}, requests.get("prefill")))
    return [call for call in calls if call.op not in without]


@pytest.mark.parametrize("run", [fused, split])
@pytest.mark.parametrize("case", conformance.cases(), ids=str)
def test_kernels_of_ones_own_pass(case, run):
    assert conformance.faults(case, run=run) == ()
    conformance.check(case, run=run)


@pytest.mark.parametrize("name", TENSORS)
def test_a_wrong_tensor_in_a_kernel_of_ones_own(name):
    stray = SentinelTensor("stray")
    for case in conformance.cases():
        (fault,) = conformance.faults(case, run=lambda c: fused(c, **{name: stray}))
        assert (fault.op, fault.argument, fault.got) == ("fused_kernel", name, "<stray>")
        assert fault.expected == repr(case.expected[name])
        found = conformance.faults(case, run=lambda c: fused(c, **{name: None}))
        want = [] if case.expected[name] is None else [name]
        assert [one.argument for one in found] == want


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("op", ["store", "load", "decode", "prefill"])
def test_a_kernel_needs_what_its_roles_need(op, name):
    for case in conformance.cases(scenarios=["mixed"]):
        calls = split(case)
        (call,) = [one for one in calls if one.op == op]
        given = dict(call.arguments)
        needed = given.pop(name, None) is not None
        calls[calls.index(call)] = Observation(call.op, call.roles, given)
        found = conformance.faults(case, run=lambda c, calls=calls: calls)
        assert [(fault.op, fault.argument) for fault in found] == [(op, name)] * needed
        # And what it could do without is right where it is given.
        given[name] = SentinelTensor("stray")
        (fault,) = conformance.faults(case, run=lambda c, calls=calls: calls)
        assert (fault.op, fault.argument, fault.got) == (op, name, "<stray>")


@pytest.mark.parametrize(
    ("without", "op", "steps"),
    [
        ("store", "write", set(SCENARIOS)),
        ("load", "gather", {"prefill over a prefix", "mixed"}),
        ("decode", "attend", {"decode only", "mixed"}),
        ("prefill", "attend", set(SCENARIOS) - {"decode only"}),
    ],
)
def test_a_kernel_of_ones_own_that_is_not_called(without, op, steps):
    for case in conformance.cases():
        found = conformance.faults(case, run=lambda c: split(c, without=[without]))
        assert (op in {fault.op for fault in found}) == (case.scenario.name in steps)


def test_requests_may_be_said():
    said = {"decode": (0, 2), "gather": (2, 4), "prefill": (2, 4)}
    assert conformance.faults(MIXED, run=lambda c: split(c, **said)) == ()
    (fault,) = conformance.faults(MIXED, run=lambda c: split(c, **said | {"gather": (2, 3)}))
    assert fault.got == "none for request 3, whose keys are cached"
    (fault,) = conformance.faults(MIXED, run=lambda c: split(c, **said | {"decode": (0, 1)}))
    assert fault.got == "request 1 never attended"
    (fault,) = conformance.faults(MIXED, run=lambda c: split(c, **said | {"decode": (0, 3)}))
    assert fault.got == "request 2 attended twice"


def test_a_kernel_may_have_names_of_its_own():
    def run(case):
        arguments = by_attributes(case) | {"k": case.caches[-1]}
        return [
            Observation("mine", ("write", "attend_pages"), arguments, labels={"k": "key_cache"})
        ]

    with pytest.raises(ConformanceError, match=r"^mine: key_cache \(format cache_int4_zp; layer 0"):
        conformance.check(MIXED, run=run)


@pytest.mark.parametrize(
    ("roles", "arguments", "text"),
    [
        (("wright",), {}, "roles: expected one of write, gather.*Did you mean 'write'"),
        (("write",), {"kscale": None}, "arguments: expected one of k, v, .*Did you mean 'k_scale'"),
    ],
)
def test_a_misspelt_observation(roles, arguments, text):
    with pytest.raises(UnknownNameError, match=text):
        Observation("mine", roles, arguments)


# --- the error ------------------------------------------------------------------------------------


class Broken:
    """Reads a value."""

    def __init__(self, ops):
        self.ops = ops

    def forward_mixed(self, qkv, layer, meta):
        return int(meta.cache_seqlens)


def test_an_exception_is_a_fault_and_the_cause():
    with pytest.raises(ConformanceError) as caught:
        conformance.check(MIXED, Broken)
    text = "SentinelError: <cache_seqlens> was asked for values, which policy never reads"
    assert str(caught.value) == (
        "the backend: call (format cache_int4_zp; layer 0 of 5, uniform list, mixed): "
        f"expected no exception, got {text}"
    )
    assert type(caught.value.__cause__).__name__ == "SentinelError"
    with pytest.raises(ConformanceError, match="got SentinelError"):
        conformance.check_backend(Broken, tried=[MIXED])
    (fault,) = conformance.faults(
        MIXED, run=lambda case: Broken(None).forward_mixed(0, 0, case.meta)
    )
    assert fault.got == text


def test_all_cases_together_and_the_first_twenty_shown():
    def mistaken(real, qkv, cache, **kwargs):
        return real(qkv, None, **kwargs)

    with pytest.raises(ConformanceError) as caught:
        conformance.check_backend(changed(AppendBackend, rope_write_kv=mistaken))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == f"… and {len(caught.value.faults) - 20} more"
    assert len({str(fault.case) for fault in caught.value.faults}) == 120
    assert isinstance(caught.value, AssertionError)


def test_twenty_faults_are_shown_without_a_remark():
    fault = conformance.Fault(MIXED, "op", "k", "one", "another")
    assert str(ConformanceError([fault] * 20)) == "\n".join([str(fault)] * 20)


def test_the_error_crosses_processes():
    with pytest.raises(ConformanceError) as caught:
        conformance.check(MIXED, changed(AppendBackend, rope_write_kv=never))
    back = pickle.loads(pickle.dumps(caught.value))
    assert str(back) == str(caught.value)
    assert back.faults[0].case.caches[0].name == "caches[0] = layer 0's k"


@pytest.mark.parametrize("given", [{}, {"make_backend": AppendBackend, "run": fused}])
def test_one_way_to_run_a_backend(given):
    for call in (conformance.check, conformance.faults):
        with pytest.raises(TypeError, match="either make_backend or run"):
            call(MIXED, **given)


# --- the choice of cases --------------------------------------------------------------------------


def test_cases_can_be_chosen():
    step = Scenario("one draft", (4,), (9,), 1)
    found = conformance.cases(
        formats=[QuantType.CACHE_FP8],
        layouts=["mixed"],
        scenarios=[step, "prefill"],
        scales="bundle",
    )
    assert [str(case) for case in found] == [
        f"cache_fp8-mixed-bundle-layer{i}-{name}"
        for i in (0, 1, 4)
        for name in ("one_draft", "prefill")
    ]
    for case in found:
        assert case.layer.static_scales.k_quant is case.expected["k_quant"]
        conformance.check(case, FlashBackend)


@pytest.mark.parametrize(
    "given", [{"formats": ["fp8"]}, {"layouts": ["mix"]}, {"scenarios": ["decode"]}]
)
def test_a_misspelt_choice(given):
    with pytest.raises(UnknownNameError, match=f"conformance.cases: {next(iter(given))[:-1]}.*Did"):
        conformance.cases(**given)
