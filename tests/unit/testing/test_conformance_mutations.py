# SPDX-License-Identifier: Apache-2.0
"""The suite passes fastkv's own backends, and fails on each known way to mix tensors up."""

from dataclasses import replace
from typing import NamedTuple

import pytest

import fastkv.backends.base
from fastkv import StaticScales
from fastkv.backends import BACKEND_NAMES, AppendBackend, FlashBackend, FlashMaskBackend
from fastkv.backends.resolve import resolve
from fastkv.testing import SentinelTensor, conformance

CLASSES = {"append": AppendBackend, "flash": FlashBackend, "flash_mask": FlashMaskBackend}
CASES = conformance.cases()
#: Tensors a layer, written down again from the specification.
SIZES = {
    "none": 2,
    "cache_int8": 2,
    "cache_fp8": 2,
    "cache_int4_zp": 2,
    "block_wise_fp8": 4,
}
STATIC = {"cache_int8", "cache_fp8", "cache_int4_zp"}
NAMES = ("k", "v", "k_scale", "v_scale")
QUANT = ("k_quant", "v_quant")
DEQUANT = ("k_dequant", "v_dequant")
ZP = ("k_zp", "v_zp")

every_backend = pytest.mark.parametrize("name", BACKEND_NAMES)


# --- the cases ----------------------------------------------------------------------------------


def test_the_cases_are_every_combination():
    found = {(case.format, case.layout, case.layer_id, case.scenario.name) for case in CASES}
    assert len(found) == len(CASES) == 5 * 2 * 3 * 4
    assert {case.format for case in CASES} == set(SIZES)
    assert {case.layer_id for case in CASES} == {0, 1, 4}
    assert {case.spec.num_layers for case in CASES} == {5}
    assert {case.scenario.name for case in CASES} == {
        "decode only",
        "prefill",
        "prefill over a prefix",
        "mixed",
    }
    assert len({str(case) for case in CASES}) == len(CASES)


def formats(case):
    return [case.spec.layer_quant(i).name.value for i in range(5)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_is_what_it_says(case):
    assert formats(case)[case.layer_id] == case.format
    assert (set(formats(case)) == {case.format}) == (case.layout == "uniform")
    assert case.layer.layer_id == case.layer_id
    sizes = [SIZES[name] for name in formats(case)]
    first = sum(sizes[: case.layer_id])
    for i, name in enumerate(NAMES):
        want = case.caches[first + i] if i < sizes[case.layer_id] else None
        assert case.expected[name] is want
    # In a mixed list the layer begins where no uniform list would have it.
    begins_elsewhere = first != case.layer_id * SIZES[case.format]
    assert begins_elsewhere == (case.layout == "mixed" and case.layer_id > 0)


@every_backend
@pytest.mark.parametrize("scales", ["attributes", "bundle"])
def test_the_own_backends_pass(name, scales):
    for case in conformance.cases(scales=scales):
        assert conformance.faults(case, CLASSES[name]) == ()
    conformance.check_backend(CLASSES[name], tried=conformance.cases(scales=scales))
    conformance.check_backend(CLASSES[name])


# --- mutations ----------------------------------------------------------------------------------


#: Python itself refuses the index.
BEHIND_THE_END = ("behind the end",)


class Mutation(NamedTuple):
    """A mistake in `resolve`.

    `change(view, case)` makes it; `wrong(case)` names the arguments that are wrong then.
    """

    change: object
    wrong: object


def by_index(first_of):
    """The tensors from another place of the list."""

    def change(view, case):
        first = first_of(case)
        return replace(
            view,
            **{name: case.caches[first + i] for i, name in enumerate(NAMES[: SIZES[case.format]])},
        )

    def wrong(case):
        if first_of(case) + SIZES[case.format] > len(case.caches):
            return BEHIND_THE_END
        return [] if first_of(case) == right_first(case) else NAMES[: SIZES[case.format]]

    return Mutation(change, wrong)


def right_first(case):
    return sum(SIZES[name] for name in formats(case)[: case.layer_id])


def two_id(case):
    return 2 * case.layer_id if SIZES[case.format] == 4 else right_first(case)


def four_id(case):
    return 4 * case.layer_id if SIZES[case.format] == 2 else right_first(case)


def own_size_times_id(case):
    return SIZES[case.format] * case.layer_id


def off_by_one(case):
    other = (case.layer_id + 1) % 5
    return sum(SIZES[name] for name in formats(case)[:other])


def has_paged(case):
    return SIZES[case.format] == 4


def has_static(case):
    return case.format in STATIC


def has_zp(case):
    return case.format == "cache_int4_zp"


def exchange(view, one, other):
    """Two tensors of the view in each other's place."""
    if one in NAMES:
        return replace(view, **{one: getattr(view, other), other: getattr(view, one)})
    static = view.static
    return replace(
        view, static=replace(static, **{one: getattr(static, other), other: getattr(static, one)})
    )


def swap(applies, *pairs):
    def change(view, case):
        for pair in pairs if applies(case) else ():
            view = exchange(view, *pair)
        return view

    return Mutation(change, lambda case: [n for p in pairs for n in p] if applies(case) else [])


def with_static(view, **changes):
    """Past the constructor, which refuses half a bundle."""
    old = view.static
    static = object.__new__(StaticScales)
    for name in StaticScales.__dataclass_fields__:
        value = changes[name] if name in changes else getattr(old, name, None)
        object.__setattr__(static, name, value)
    return replace(view, static=static)


def static_field(applies, **sources):
    """Fields of the bundle from other fields of it; None drops one."""

    def change(view, case):
        if not applies(case):
            return view
        found = {
            name: None if source is None else getattr(view.static, source)
            for name, source in sources.items()
        }
        return with_static(view, **found)

    return Mutation(change, lambda case: list(sources) if applies(case) else [])


def drop_paged(name):
    return Mutation(
        lambda view, case: replace(view, **{name: None}) if has_paged(case) else view,
        lambda case: [name] if has_paged(case) else [],
    )


def namesake(case):
    """Another layer of the same format."""
    names = formats(case)
    return next(i for i in (4, 3, 2, 1, 0) if i != case.layer_id and names[i] == case.format)


def other_layers_scales(view, case):
    other = resolve(case.caches, case.layers[namesake(case)], case.spec)
    return replace(view, k_scale=other.k_scale, v_scale=other.v_scale, static=other.static)


def other_scales_wrong(case):
    if has_paged(case):
        return ("k_scale", "v_scale")
    if not has_static(case):
        return ()
    return (*QUANT, *DEQUANT, *(ZP if has_zp(case) else ()))


def zero_point(*names):
    """Zero points where the format has none: a symmetric one, or one without static scales."""

    def change(view, case):
        if has_zp(case):
            return view
        return with_static(view, **{name: SentinelTensor(f"stray {name}") for name in names})

    return Mutation(change, lambda case: [] if has_zp(case) else names)


def unfilled_scales(view, case):
    """The attributes that engines create on the layers of a dynamic format."""
    if not has_paged(case):
        return view
    layer = case.layer
    return with_static(view, k_quant=layer.cache_k_scale, v_dequant=layer.cache_v_out_scale)


MUTATIONS = {
    "2·id for a 4-tensor format": by_index(two_id),
    "4·id for a 2-tensor format": by_index(four_id),
    "by layer id in a list of mixed formats": by_index(own_size_times_id),
    "layer off by one": by_index(off_by_one),
    "K and V swapped": swap(lambda case: True, ("k", "v")),
    "paged K and V scales swapped": swap(has_paged, ("k_scale", "v_scale")),
    "static K and V scales swapped": swap(has_static, QUANT, DEQUANT),
    "quant multipliers swapped": swap(has_static, QUANT),
    "dequant multipliers swapped": swap(has_static, DEQUANT),
    "zero points swapped": swap(has_zp, ZP),
    "quant for dequant": static_field(has_static, k_dequant="k_quant", v_dequant="v_quant"),
    "quant for dequant of V": static_field(has_static, v_dequant="v_quant"),
    "dequant for quant": static_field(has_static, k_quant="k_dequant", v_quant="v_dequant"),
    "K's tensors and V's, with all scales": swap(has_static, ("k", "v"), QUANT, DEQUANT),
    "scales of another layer": Mutation(other_layers_scales, other_scales_wrong),
    "paged V scale alone dropped": drop_paged("v_scale"),
    "paged K scale alone dropped": drop_paged("k_scale"),
    "static V scale alone dropped, quant": static_field(has_static, v_quant=None),
    "static V scale alone dropped, dequant": static_field(has_static, v_dequant=None),
    "V zero point alone dropped": static_field(has_zp, v_zp=None),
    "all static scales dropped": Mutation(
        lambda view, case: replace(view, static=None),
        lambda case: [n for n in other_scales_wrong(case) if not has_paged(case)],
    ),
    "zero points to a format without": zero_point(*ZP),
    "K zero point to a format without": zero_point("k_zp"),
    "V zero point to a format without": zero_point("v_zp"),
    "scales that nobody fills": Mutation(
        unfilled_scales, lambda case: ["k_quant", "v_dequant"] if has_paged(case) else []
    ),
}


def place(name):
    return f"cache.{name}" if name in NAMES else f"cache.static.{name}"


def ops_with_a_cache(name, case):
    """Ops that take the layer's cache, from the scenario."""
    decode = {"rope_write_kv", "paged_attention"}
    if name == "append" or case.scenario.name == "decode only":
        return decode
    return {"rope_write_kv", "gather_kv"} | (decode if case.scenario.name == "mixed" else set())


@every_backend
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_in_resolve_fails_where_it_shows(mutation, name, monkeypatch):
    change, wrong = MUTATIONS[mutation]
    failed = 0
    for case in CASES:

        def mistaken(caches, layer, spec, case=case):
            return change(resolve(caches, layer, spec), case)

        monkeypatch.setattr(fastkv.backends.base, "resolve", mistaken)
        found = conformance.faults(case, CLASSES[name])
        failed += bool(wrong(case))
        if wrong(case) == BEHIND_THE_END:
            (fault,) = found
            assert fault.got == "IndexError: list index out of range"
            continue
        want = {(op, place(n)) for op in ops_with_a_cache(name, case) for n in wrong(case)}
        assert {(fault.op, fault.argument) for fault in found} == want
        assert len(found) == len(want)
        assert_names_what_came(found, case, mistaken(case.caches, case.layer, case.spec))
    assert failed


def assert_names_what_came(found, case, view):
    for fault in found:
        name = fault.argument.rpartition(".")[2]
        came = getattr(view if name in NAMES else view.static, name, None)
        assert fault.got == repr(came)
        assert fault.expected == repr(case.expected[name])
        assert fault.expected != fault.got
        for part in (
            fault.op,
            fault.argument,
            f"format {case.format};",
            f"layer {case.layer_id} of 5",
            "uniform list" if case.layout == "uniform" else "list of mixed formats",
            case.scenario.name,
            f"expected {fault.expected}",
            f"got {fault.got}",
        ):
            assert part in str(fault)


def test_the_engines_bug_shows_the_other_layers_name(monkeypatch):
    # The bug that fastkv ends: a dynamic format indexed as if it kept 2 tensors a layer.
    monkeypatch.setattr(
        fastkv.backends.base,
        "resolve",
        lambda caches, layer, spec: replace(resolve(caches, layer, spec), k=caches[2]),
    )
    (case,) = [one for one in CASES if str(one) == "block_wise_fp8-uniform-attributes-layer1-mixed"]
    with pytest.raises(conformance.ConformanceError) as caught:
        conformance.check(case, AppendBackend)
    assert str(caught.value).splitlines()[1] == (
        "paged_attention: cache.k (format block_wise_fp8; layer 1 of 5, uniform list, mixed): "
        "expected <caches[4] = layer 1's k>, got <caches[2] = layer 0's k_scale>"
    )


@every_backend
@pytest.mark.parametrize("layer_id", [0, 3])
def test_the_view_of_another_layer_fails_in_every_part(name, layer_id, monkeypatch):
    def mistaken(caches, layer, spec):
        return resolve(caches, all_layers[layer_id], spec)

    monkeypatch.setattr(fastkv.backends.base, "resolve", mistaken)
    for case in CASES:
        all_layers = case.layers
        wrong = {fault.argument for fault in conformance.faults(case, CLASSES[name])}
        if layer_id == case.layer_id:
            assert wrong == set()
        else:
            assert {"cache.k", "cache.v", "cache.layer_id"} <= wrong


# --- a mistake in one op's arguments alone --------------------------------------------------------


class FaultyOps:
    """Ops that a backend calls through: one of them gets another cache."""

    def __init__(self, ops, op, change):
        self._ops, self._op, self._change = ops, op, change

    def __getattr__(self, name):
        real = getattr(self._ops, name)
        if name != self._op:
            return real

        def call(*args, **kwargs):
            changed = [self._change(one) if hasattr(one, "layer_id") else one for one in args]
            return real(*changed, **kwargs)

        return call


SWAPS = {
    "v alone": lambda cache: replace(cache, v=cache.k),
    "another layer's id": lambda cache: replace(cache, layer_id=2),
    "another spec": lambda cache: replace(cache, spec=replace(cache.spec, page_size=128)),
    "a slice of k": lambda cache: replace(cache, k=cache.k[0:5]),
    "another object for k": lambda cache: replace(cache, k=object()),
}
SHOWS = {
    "v alone": ("cache.v", "k>"),
    "another layer's id": ("cache.layer_id", "2"),
    "another spec": ("cache.spec", "CacheSpec"),
    "a slice of k": ("cache.k", "[0:5]>"),
    "another object for k": ("cache.k", "object"),
}


@pytest.mark.parametrize("mistake", SWAPS)
@pytest.mark.parametrize("op", ["rope_write_kv", "gather_kv", "paged_attention"])
@every_backend
def test_a_mistake_in_one_call(name, op, mistake):
    argument, got = SHOWS[mistake]
    for case in CASES:
        found = conformance.faults(
            case, lambda ops: CLASSES[name](FaultyOps(ops, op, SWAPS[mistake]))
        )
        if op not in ops_with_a_cache(name, case):
            assert found == ()
            continue
        assert {(fault.op, fault.argument) for fault in found} == {(op, argument)}
        assert all(fault.got.endswith(got) for fault in found)


@every_backend
def test_another_layout_of_the_right_tensor_is_right(name):
    def relaid(cache):
        return replace(cache, k=cache.k.view(-1), v=cache.v[:].contiguous())

    for case in CASES:
        for op in ops_with_a_cache(name, case):
            found = conformance.faults(
                case, lambda ops, op=op: CLASSES[name](FaultyOps(ops, op, relaid))
            )
            assert found == ()


@every_backend
@pytest.mark.parametrize("op", ["rope_write_kv", "gather_kv", "paged_attention"])
def test_no_cache_at_all(name, op):
    for case in CASES:
        if op in ops_with_a_cache(name, case):
            found = conformance.faults(
                case, lambda o: CLASSES[name](FaultyOps(o, op, lambda cache: None))
            )
            assert {"cache.k", "cache.v", "cache.spec"} <= {fault.argument for fault in found}
            assert {(fault.op, fault.got) for fault in found} == {(op, "None")}
