# SPDX-License-Identifier: Apache-2.0
"""A contract is checked once for each metadata of GPU tensors, and never remembered for another."""

import sys
from dataclasses import replace

import pytest

from fastkv import CacheSpec, LayerCache, Rope, StaticScales
from fastkv.contracts import calls
from fastkv.contracts.remember import remembered
from fastkv.errors import ContractError


class Tensor:
    """Stands for a tensor on a GPU, or, without metadata, on the CPU."""

    def __init__(self, *metadata):
        self.metadata = metadata or None


class Library:
    """A library's metadata; with a test of them as PyTorch's, where `tests` is set."""

    def __init__(self, tests):
        self.tests, self.mode, self.asked = tests, "grad", []

    def signature(self, tensor):
        self.asked.append(tensor)
        return getattr(tensor, "metadata", None)

    def likeness(self, tensors):
        """Also of the mode."""
        mode, metadata = self.mode, [tensor.metadata for tensor in tensors]
        assert None not in metadata

        def alike(*others):
            assert len(others) == len(metadata), "PyTorch raises"
            found = [getattr(other, "metadata", None) for other in others]
            return self.mode == mode and found == metadata

        return alike if self.tests else None


@pytest.fixture(autouse=True, params=[True, False], ids=["tests", "keys"])
def library(request, monkeypatch):
    """Libraries with and without a test of their own."""
    found = Library(request.param)
    monkeypatch.setattr("fastkv.contracts.remember.signature", found.signature)
    monkeypatch.setattr("fastkv.contracts.remember.likeness", found.likeness)
    return found


SPEC = CacheSpec(2, 2, 8, 4, "cache_int8")


def scales(**changes):
    names = ("k_quant", "k_dequant", "v_quant", "v_dequant", "k_zp", "v_zp")
    return StaticScales(**({name: Tensor(name) for name in names} | changes))


def full_call():
    """Every kind of argument that a contract takes."""
    tensors = {name: Tensor(name) for name in ("k", "v", "k_scale", "v_scale")}
    cache = LayerCache(SPEC, 0, **tensors, static=scales())
    return [Tensor("q"), cache, Rope(Tensor("cos"), Tensor("sin")), None, True, 7, 0.5, "append"]


class Contract:
    """Counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        return object()


@pytest.fixture
def contract():
    return Contract()


@pytest.fixture
def check(contract):
    # `wraps` needs what a function has.
    def counted(*args):
        return contract(*args)

    return remembered(counted)


def changed(args, position, value):
    return [*args[:position], value, *args[position + 1 :]]


def test_the_same_call_is_checked_once(check, contract):
    args = full_call()
    first = check(*args)
    assert check(*args) is first
    # Other tensors of the same metadata, as the next step brings them.
    again = changed(args, 0, Tensor("q"))
    again[1] = replace(args[1], k=Tensor("k"), static=scales())
    again[2] = Rope(Tensor("cos"), Tensor("sin"))
    assert check(*again) is first
    assert contract.calls == 1


def others():
    """Calls that differ in one thing that a contract can see."""
    args = full_call()
    cache = args[1]
    yield "tensor", changed(args, 0, Tensor("another q"))
    yield "absent tensor", changed(args, 0, None)
    yield "present tensor", changed(args, 3, Tensor("sinks"))
    for name in ("k", "v", "k_scale", "v_scale"):
        yield f"cache.{name}", changed(args, 1, replace(cache, **{name: Tensor("other")}))
        yield f"no cache.{name}", changed(args, 1, replace(cache, **{name: None}))
    for name in ("k_quant", "k_dequant", "v_quant", "v_dequant", "k_zp", "v_zp"):
        static = scales(**{name: Tensor("other")})
        yield f"static.{name}", changed(args, 1, replace(cache, static=static))
    yield "no zero points", changed(args, 1, replace(cache, static=scales(k_zp=None, v_zp=None)))
    yield "no static", changed(args, 1, replace(cache, static=None))
    yield "layer", changed(args, 1, replace(cache, layer_id=1))
    yield "layer False", changed(args, 1, replace(cache, layer_id=False))
    yield "layer 0.0", changed(args, 1, replace(cache, layer_id=0.0))
    yield "layer []", changed(args, 1, replace(cache, layer_id=[]))
    yield "spec", changed(args, 1, replace(cache, spec=replace(SPEC)))
    yield "rope.cos", changed(args, 2, Rope(Tensor("other"), Tensor("sin")))
    yield "rope.sin", changed(args, 2, Rope(Tensor("cos"), Tensor("other")))
    yield "no rope", changed(args, 2, None)
    yield "number", changed(args, 5, 8)
    yield "True for 1", changed(args, 4, 1)
    yield "1.0 for True", changed(args, 4, 1.0)
    yield "op", changed(args, 7, "flash")


# Made in the test: a bundle keeps what was found of it.
@pytest.mark.parametrize("name", [name for name, _ in others()])
def test_another_call_is_checked_anew(name, check, contract):
    args = dict(others())[name]
    first = check(*full_call())
    second = check(*args)
    assert second is not first
    assert contract.calls == 2
    if type(args[1].layer_id) is int:
        assert check(*args) is second


def test_a_tensor_that_was_changed_in_place_is_checked_anew(check, contract):
    # As `resize_`, `set_`, `transpose_` and `.data =` do: the objects are the same.
    args = full_call()
    cache = args[1]
    first = check(*args)
    for tensor in (args[0], cache.k, cache.v_scale, cache.static.k_zp, args[2].sin):
        old, tensor.metadata = tensor.metadata, ("changed",)
        assert check(*args) is not first
        tensor.metadata = old
        assert check(*args) is first
    assert contract.calls == 6


def test_a_bundle_is_taken_apart_once(check, contract, monkeypatch):
    args = full_call()
    first = check(*args)
    monkeypatch.setattr("fastkv.contracts.remember._marked", None)
    assert check(*args) is first
    with pytest.raises(TypeError):
        check(*changed(args, 2, replace(args[2])))
    assert contract.calls == 1


def test_layers_share_what_their_scales_are(check, contract, monkeypatch):
    args = full_call()
    check(*args)
    static = args[1].static
    second = check(*changed(args, 1, replace(args[1], layer_id=1)))
    assert args[1].static is static
    assert check(*args) is not second
    static.k_quant.metadata = ("changed",)
    assert check(*args) is not check(*changed(args, 1, replace(args[1], layer_id=1)))
    assert contract.calls == 4


def test_the_last_few_metadata_are_found_without_a_key(check, library, contract):
    shapes = ["a", "b", "c", "d"]
    first = {shape: check(Tensor(shape)) for shape in shapes}
    library.asked.clear()
    for shape in shapes * 2:
        assert check(Tensor(shape)) is first[shape]
    assert len(library.asked) == (0 if library.tests else 8)
    check(Tensor("e"))
    check(Tensor("a"))  # the oldest went
    assert check(Tensor("d")) is first["d"]
    assert contract.calls == 5


def keys_made(library, check, *args):
    """How many of some calls made a key."""
    before = len(library.asked)
    for _ in range(3):
        check(*args)
    return (len(library.asked) - before) // len({id(arg) for arg in args if type(arg) is Tensor})


def test_in_another_mode_the_same_check_is_found_and_soon_without_a_key(check, library, contract):
    first = check(Tensor("q"))
    library.mode = "inference"
    assert keys_made(library, check, Tensor("q")) == (1 if library.tests else 3)
    library.mode = "grad"
    assert keys_made(library, check, Tensor("q")) == (0 if library.tests else 3)
    assert check(Tensor("q")) is first
    assert contract.calls == 1


def test_an_incomplete_rope_is_not_taken_for_none_and_a_rope_behind_it(check):
    first = check(None, Rope(Tensor("table"), Tensor("table")))
    assert check(Rope(None, Tensor("table")), Tensor("table")) is not first


def test_an_absent_tensor_hides_none_behind_it(check, contract):
    args = full_call()
    without = replace(args[1], k=None)
    first = check(*changed(args, 1, without))
    assert check(*changed(args, 1, replace(without, v=Tensor("another")))) is not first
    assert contract.calls == 2


def test_a_spec_lives_as_long_as_its_entry(check):
    # Its id is in the key, and must not become another spec's.
    args, spec = full_call(), replace(SPEC)
    args[1] = replace(args[1], spec=spec)
    before = sys.getrefcount(spec)
    check(*args)
    args.clear()
    assert sys.getrefcount(spec) == before


def test_what_is_forgotten_is_not_found_by_its_metadata(check, contract, monkeypatch):
    monkeypatch.setattr("fastkv.contracts.remember._MOST", 1)
    first = check(Tensor("a"), 1)
    check(Tensor("a"), 2)
    assert check(Tensor("a"), 1) is not first
    assert contract.calls == 3


def on_the_cpu():
    args = full_call()
    cache = args[1]
    yield changed(args, 0, Tensor())
    for name in ("k", "v_scale"):
        yield changed(args, 1, replace(cache, **{name: Tensor()}))
    for name in ("k_quant", "v_dequant", "k_zp", "v_zp"):
        yield changed(args, 1, replace(cache, static=scales(**{name: Tensor()})))
    yield changed(args, 1, replace(cache, static=Tensor("no StaticScales")))
    yield changed(args, 2, Rope(Tensor("cos"), Tensor()))
    yield changed(args, 1, replace(cache, layer_id=[]))


@pytest.mark.parametrize("number", range(len(list(on_the_cpu()))))
def test_with_a_tensor_on_the_cpu_every_call_is_checked(number, check, contract):
    args = list(on_the_cpu())[number]
    assert check(*args) is not check(*args)
    assert contract.calls == 2


def test_a_fault_is_found_again():
    faults = []

    @remembered
    def check(*args):
        faults.append(args)
        raise ContractError("op", "q", expected="another", got="this")

    for _ in range(2):
        with pytest.raises(ContractError):
            check(Tensor("q"))
    assert len(faults) == 2


def test_past_the_limit_all_are_forgotten(check, contract, monkeypatch):
    monkeypatch.setattr("fastkv.contracts.remember._MOST", 2)
    for q in ("a", "b", "a", "b"):
        check(Tensor(q))
    assert contract.calls == 2
    check(Tensor("c"))
    check(Tensor("c"))
    assert contract.calls == 3
    check(Tensor("a"))
    assert contract.calls == 4


def test_each_contract_remembers_its_own():
    first, second = remembered(lambda *args: "first"), remembered(lambda *args: "second")
    assert (first(Tensor("q")), second(Tensor("q"))) == ("first", "second")


@pytest.mark.parametrize("name", ["rope_write_kv", "paged_attention", "copy_pages", "check_step"])
def test_the_contracts_of_ops_are_remembered(name):
    assert getattr(calls, name).__wrapped__.__name__ == name
